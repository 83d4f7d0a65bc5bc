"""Rounders: they choose one of the two neighbouring codes of a value."""
