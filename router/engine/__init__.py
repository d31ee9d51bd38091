"""Rows in, results out: one base, any mixture of adapters, generation and classification in the same batch."""
