"""SVDQuant: 4-bit layers with a low-rank branch."""

from .method import SVDQuantConfig

__all__ = ["SVDQuantConfig"]
