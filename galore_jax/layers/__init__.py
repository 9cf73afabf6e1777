"""Training layer by layer: the loss taken apart, the optimizer taken apart, the step."""
