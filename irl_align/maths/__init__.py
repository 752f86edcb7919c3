"""Pure functions on tensors: losses and log-probabilities. Imports torch only.

Legend of shapes: B rows, N samples per prompt, P prompt tokens, T completion tokens, L = P + T,
V vocabulary, H hidden width.
"""
