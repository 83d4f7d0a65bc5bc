"""Inputs of quantized layers on their way from a norm, or through a module that hands them on, quantized once."""
