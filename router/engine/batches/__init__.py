"""Rows under way: their prompts read in chunks, decoded side by side over one cache, answered by heads or as text."""
