"""Attention that reads keys and values in 4 bits."""
