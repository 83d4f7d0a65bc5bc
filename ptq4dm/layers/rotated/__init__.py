"""Layers whose inputs are rotated in every call, and their weights to match (kernels/formats/rotation.py)."""

from ...registry import load_members

load_members(__name__, __path__)
