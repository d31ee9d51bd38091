"""The merges in parameter space, one file each: name, options and function; see ``compose.parameter_space.method``."""
