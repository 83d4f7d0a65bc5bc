"""Schedules fitted to a model: times by dynamic programming, weights by least squares, after a teacher."""
