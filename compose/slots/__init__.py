"""What is computed at one place of the model: lowering an expression to stages, and the wrapper that runs them."""
