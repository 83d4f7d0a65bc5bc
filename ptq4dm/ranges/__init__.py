"""How far a grid reaches: range objectives."""
