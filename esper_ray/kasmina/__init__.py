"""Kasmina: seeds in the model. Lifecycle, gates, blending, isolation; it changes a model and decides nothing."""
