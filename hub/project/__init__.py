"""A user's project and machine: modules.lock, named remotes, garbage collection, doctor."""
