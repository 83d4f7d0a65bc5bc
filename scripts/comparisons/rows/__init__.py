"""Rows of the table of all methods, one family a file."""
