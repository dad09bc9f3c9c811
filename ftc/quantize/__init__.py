"""Formats of weights for serving: calibration, sensitivity, what to pick within a budget."""
