"""Looking before loading: a base of fake tensors, explain, adapter map, the doctor of merges."""
