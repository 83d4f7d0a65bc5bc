"""SVDQuant's quantized layers, and blocks fused around them."""
