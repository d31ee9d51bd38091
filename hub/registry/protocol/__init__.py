"""The Hugging Face protocol, a few routes a file."""
