"""Plugins: what must hold before an artifact is published, one file each (contract: `hub.gate`)."""
