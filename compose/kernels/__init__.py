"""Tensor arithmetic that knows no model: low-rank mixtures, weights per row and token, linear maps, factors."""
