"""Choices judged by what the model makes of them: of its prediction, through all that runs after a layer."""
