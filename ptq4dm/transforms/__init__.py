"""Passes that change a model and not its function."""
