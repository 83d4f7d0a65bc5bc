"""Layers that train on integers: ShiftQuant's Linear and Conv2d, and L1 normalization."""
