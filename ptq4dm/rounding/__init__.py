"""Which of two neighbouring codes: rounders."""
