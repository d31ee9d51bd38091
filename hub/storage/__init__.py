"""How a store keeps it: blobs, ledger, staging, vault, index, search, releases, OCI face, signatures, verification."""
