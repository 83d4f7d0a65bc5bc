"""The version, here so that nothing inside imports the package itself."""

__version__ = "0.2.0"
