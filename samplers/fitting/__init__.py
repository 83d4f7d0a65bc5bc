"""Schedules fitted to a model: times by dynamic programming, weights by least squares, from a teacher's trajectories."""
