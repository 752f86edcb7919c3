"""Faults on purpose: small full loops are killed, starved, damaged and misled, and run again.

``make faults`` runs 50 cases and writes a table.
tests/integration/test_faults.py runs a few. A fault is a small class in :mod:`faults.kinds`.
"""
