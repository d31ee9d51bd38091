"""What may be inside an artifact: tensor files, gates, scans, the manifest without its tensors."""
