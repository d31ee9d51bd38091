"""The frozen model: find it, load it, quantize it, know which one it is, name its places."""
