"""Formats of ``hub export``, one file each; see ``compose.artifacts.export_format``."""
