"""Our adapters in front of, and inside, engines of others."""
