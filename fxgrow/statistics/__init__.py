"""Second moments of layer inputs and output gradients, from one forward and backward pass per batch."""
