"""Training: of packed models by forward passes alone, and on integers."""
