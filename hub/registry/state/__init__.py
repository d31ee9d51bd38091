"""Repositories, drafts, commits, publishing, search, lineage: what the registry knows and changes."""
