"""The recipe: its options, YAML, overrides."""
