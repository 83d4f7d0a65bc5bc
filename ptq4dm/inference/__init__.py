"""A loaded model made as fast as its device allows: fused, blocks compiled, steps in CUDA graphs."""
