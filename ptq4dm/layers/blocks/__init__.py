"""Layers whose weights are codes in blocks, as files of other tools have them."""

from ...registry import load_members

load_members(__name__, __path__)
