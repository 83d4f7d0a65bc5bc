"""Layers whose input is split at the seams of a concatenation, a grid for each part; and layers of split weights."""

from ...registry import load_members

load_members(__name__, __path__)
