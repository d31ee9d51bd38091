"""Files that must be whole, canonical JSON, disk errors, threads, sockets."""
