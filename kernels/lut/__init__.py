"""Linear layers of few rows by look-up tables: binary-coded weights under 16-bit inputs."""
