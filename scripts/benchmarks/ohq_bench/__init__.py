"""What compare_ohq.py holds OHQ against: errors on other seeds, other ways to find sensitivities, measured steps."""
