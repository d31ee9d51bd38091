"""Templates, label words, filled prompts, demonstrations, templates written by a model."""
