"""DEMix: experts folded into the batch, belief over them, mixtures of probabilities, generation."""
