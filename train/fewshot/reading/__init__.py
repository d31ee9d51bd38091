"""What a model says of a prompt: reader, views, masks, pairs, a head on views."""
