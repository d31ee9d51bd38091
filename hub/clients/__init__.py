"""Clients of foreign services, with errors that say what to do: Hugging Face, OCI registries."""
