"""Layers whose 4-bit codes stand for the levels of a codebook."""

from ...registry import load_members

load_members(__name__, __path__)
