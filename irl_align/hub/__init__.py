"""What leaves a run: reward models, policies and pairs as Hub repositories with their cards."""
