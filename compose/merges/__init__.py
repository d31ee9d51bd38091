"""The merges in parameter space, one file a method; see ``compose.merge``. Importing a file registers it."""
