"""Passes that change a model and not its function. A new file here that registers itself is a new transform."""

from ..registry import load_members

load_members(__name__, __path__)
