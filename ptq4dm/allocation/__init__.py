"""Who gets which format: allocators choose a plan for each layer among candidates."""
