"""SVDQuant (planned): smoothing and a low-rank branch for 4-bit layers."""
