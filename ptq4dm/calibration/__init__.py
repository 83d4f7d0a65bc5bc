"""What a model sees while it samples: recorded calls, statistics, traces."""
