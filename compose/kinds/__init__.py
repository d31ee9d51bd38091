"""The kinds, one file each. Importing a file registers it; :func:`compose.kind.adapter.kinds` imports them all."""
