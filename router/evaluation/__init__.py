"""How well a router does, on which texts, as pictures; which adapters a text is like."""
