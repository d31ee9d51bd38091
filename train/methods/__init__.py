"""One file for each method: what it trains, and what it does in its own way."""
