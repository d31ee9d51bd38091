"""The tree itself: nodes, words, quoting. Pure data."""
