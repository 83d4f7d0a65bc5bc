"""Layers whose weights are sums of sign planes. A new file here that calls `register_format` is a new format."""

from ...registry import load_members

load_members(__name__, __path__)
