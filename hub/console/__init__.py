"""What commands print and how they show progress; used by every package."""
