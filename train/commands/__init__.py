"""`hub train`, `hub methods`, `hub eval` and `hub race`."""
