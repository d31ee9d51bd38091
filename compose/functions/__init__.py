"""One file per function (or family of functions) of the composition algebra; see ``compose.function``."""
