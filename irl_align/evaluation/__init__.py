"""Judge what a run made."""
