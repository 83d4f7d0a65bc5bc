"""Files of quantized models that other tools write, in and out."""
