"""Block reconstruction: what quantization changes in a block, judged by what the block and the model give."""
