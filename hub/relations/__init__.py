"""How artifacts relate: lineage, differences, the next version, words in common with a text."""
