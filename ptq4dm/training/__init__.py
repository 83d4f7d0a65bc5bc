"""Training: on integers, on pictures of a folder; and of packed models by forward passes alone."""
