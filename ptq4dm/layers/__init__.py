"""A model's layers as methods see them, and the quantized ones that take their place.

A new file here that calls `register_format` is a new format.
"""

from ..registry import load_members

load_members(__name__, __path__)
