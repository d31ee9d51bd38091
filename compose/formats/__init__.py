"""Adapter directories on disk: ours, PEFT's, AdapterHub's."""
