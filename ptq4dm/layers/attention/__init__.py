"""Attention of a model's layers in 8 bits: processors that compute it, and what they have done."""
