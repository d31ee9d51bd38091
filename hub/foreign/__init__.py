"""Adapters of others on their way in: where they are, what their PEFT config says."""
