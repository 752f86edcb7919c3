"""PPO with token-level credit. `update` holds the policy update; the rest are its parts."""
