"""Linear layers with 4-bit weights and a low-rank branch: W4A8, W4A4, W4A16."""
