"""Nunchaku's checkpoints, in and out."""
