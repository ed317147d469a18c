"""Tolaria: the training loop. It trains, measures, asks at each boundary, and writes down what happened."""
