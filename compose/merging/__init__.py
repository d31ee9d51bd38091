"""What is done with the adapters of a model outside a forward: merge, fold into the base, widen, compare."""
