"""Language models: loading, LoRA, log-probabilities, packing, training with TRL, sampling.

Legend of shapes, for the whole package: B rows, N samples per prompt, P prompt tokens,
T completion tokens, L = P + T, V vocabulary, H hidden width.
"""
