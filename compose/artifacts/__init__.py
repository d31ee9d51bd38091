"""To and from the hub: publish, import, export, probes, cards, the placement gate."""
