"""Urza: stores kernels and serves them. No torch here; artifacts are safetensors files named by their digest."""
