"""Attention whose operands have 8 bits, in a model of diffusers."""
