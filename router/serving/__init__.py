"""`hub serve`: the engine behind OpenAI's API."""
