"""Capture: a model's blocks and shell as FX graphs, with variants for inputs of different structure."""
