"""Recipe, plan, the verb `quantize`, and its way into and out of diffusers."""
