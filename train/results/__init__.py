"""What a run leaves: folder, report, tracking, card, artifact."""
