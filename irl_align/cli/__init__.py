"""The commands. Only this package prints to a person and wires the others together."""
