"""The kinds, one file each. Importing a file registers it; :func:`compose.kind.kinds` imports them all."""
