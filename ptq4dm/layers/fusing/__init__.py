"""What fused modules compute: of UNets, of transformers, and by a CPU's kernels."""
