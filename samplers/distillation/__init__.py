"""DisBack: distillation to one step."""
