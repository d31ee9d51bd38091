"""From an expression to a checked plan, by manifests alone: members, unfolded compositions, requirements."""
