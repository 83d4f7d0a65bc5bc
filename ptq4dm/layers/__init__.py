"""A model's layers as methods see them, and the quantized ones that take their place."""
