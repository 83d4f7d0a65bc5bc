"""Linear and Conv2d on 8-bit codes: reference, oneDNN, Triton."""
