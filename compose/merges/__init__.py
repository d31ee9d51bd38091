"""The merges in parameter space, one file a method; see ``compose.merging.merge``. Importing a file registers it."""
