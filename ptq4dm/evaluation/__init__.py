"""What quantization cost and gained: distances, paired errors, bytes, time."""
