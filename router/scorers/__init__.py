"""How experts are scored for a row: one file each."""
