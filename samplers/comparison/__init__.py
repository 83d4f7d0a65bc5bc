"""Samplers against each other: `ptq4dm bench samplers`."""
