"""Choices judged by what a block, or the whole model, makes of them: training of blocks, ranges by prediction."""
