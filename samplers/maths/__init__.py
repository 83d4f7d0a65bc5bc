"""Noise schedules, timestep grids and solver coefficients, in float64."""
