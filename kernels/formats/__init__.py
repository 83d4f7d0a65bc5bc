"""The number formats: codes, scales, packing; formulas in torch."""
