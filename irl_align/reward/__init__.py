"""The reward level: reward functions, their fit on pairs, and their audit."""
