"""Which settings run fastest on a GPU: the search behind `ptq4dm bench tune`."""
