"""What `ptq4dm bench` has a file of its own for."""
