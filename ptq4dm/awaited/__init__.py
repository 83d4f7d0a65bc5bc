"""Networks that wait for the first calls of their own use, and are then changed in place."""
