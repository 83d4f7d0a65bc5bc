"""Products with weights in blocks, as files of other tools have them."""
