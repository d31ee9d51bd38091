"""Text and JSON to tree and back, normal form, digest, carets under errors."""
