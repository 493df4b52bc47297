"""Products with gradients: see `_functions`."""
