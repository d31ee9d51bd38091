"""The readers, one file each: see `compose.reader`."""
