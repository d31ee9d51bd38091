"""The web catalogue: views, page, wording, lineage picture, Markdown; templates/ and static/ move in here."""
