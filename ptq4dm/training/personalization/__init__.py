"""Personalization of a packed model by forward passes alone: a token of its text, or a class row (ZOODiP)."""
