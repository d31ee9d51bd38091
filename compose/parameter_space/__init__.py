"""What merging works on: the effects of adapters on weights, and tensors read in blocks."""
