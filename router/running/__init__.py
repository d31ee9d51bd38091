"""`hub run`: rows of a JSONL file through the engine, and on after an interruption."""
