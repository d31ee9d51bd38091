"""What trains inside an adapter: heads, reparametrized tensors, sparsified deltas."""
