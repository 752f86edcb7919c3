"""The loop of inverse RL, its steps, and the run folder."""
