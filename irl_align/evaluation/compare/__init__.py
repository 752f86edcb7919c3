"""Methods side by side over seeds. Imports no torch."""
