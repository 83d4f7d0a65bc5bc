"""Range objectives: they choose how far a grid reaches."""
