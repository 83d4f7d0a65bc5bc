"""Pipelines in, images out: opening, sampling, saving pictures."""
