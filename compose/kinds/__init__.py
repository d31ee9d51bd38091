"""The kinds, one file each. Importing a file registers it; :func:`compose.kind.registry.kinds` imports them all."""
