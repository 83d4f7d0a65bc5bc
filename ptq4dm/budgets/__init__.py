"""Which format each layer gets under budgets of time, measured on the device that runs it, and of bytes."""
