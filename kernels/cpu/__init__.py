"""Kernels in C++ that are compiled on the machine they run on: 4-bit weights under 8-bit inputs."""
