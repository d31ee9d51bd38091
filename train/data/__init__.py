"""Files to rows, rows to datasets, batches."""
