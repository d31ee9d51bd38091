"""What may be inside an artifact: tensor files, what files must be, scans, the manifest without its tensors."""
