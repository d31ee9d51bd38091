"""The verbs of ``hub``, one a file; `hub.cli` reaches them by name."""
