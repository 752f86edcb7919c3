"""Demonstrations: cards, sources, splits, token ids, pairs."""
