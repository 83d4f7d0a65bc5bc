"""What stays the same over the steps of sampling, computed once."""
