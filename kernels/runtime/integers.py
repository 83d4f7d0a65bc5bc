"""Whole numbers that a launch needs. Triton's own functions take 2 us a call, for kernels may call them as well."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
