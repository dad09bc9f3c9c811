"""Products in 8-bit floats for training: recipes, scales, what is kept for the backward pass."""
