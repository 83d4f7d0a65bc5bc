"""Files that are whole at any time: atomic writes, rows of a long measurement, training states."""
