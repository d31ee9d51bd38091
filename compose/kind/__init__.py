"""What every kind is made of: contract, named tensors, low-rank pair, shifted parameters, heads, registry."""
