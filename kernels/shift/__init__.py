"""Products of integers that training needs: outputs, input gradients, weight gradients."""
