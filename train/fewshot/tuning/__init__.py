"""Training an adapter by prompts: tuning, refining, distilling."""
