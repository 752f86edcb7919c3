"""Helpers of the tests: tiny models and runs, servers on loopback, rows."""
