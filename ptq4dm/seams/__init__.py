"""Seams of inputs, where a model concatenated what a layer reads: observed, with what each part holds."""
