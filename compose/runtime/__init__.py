"""Adapters living in one whole model: residents, activation, hooks, prompts, prefixes, positions."""
