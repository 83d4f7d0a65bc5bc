"""Several models side by side: the same seeds, one table, one picture, one page."""
