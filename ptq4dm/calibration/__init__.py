"""Calibration: recorded calls of a model while it samples, statistics of its layers, traces."""
