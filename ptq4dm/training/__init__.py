"""Training of denoisers: on integers, on pictures of a folder."""
