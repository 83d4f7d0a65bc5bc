"""Kernels that multiply: 8-bit or 16-bit rows by weights of 4 bits, packed or unpacked."""
