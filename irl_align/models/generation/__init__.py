"""Sampling: prompt token ids in, completion token ids out, with transformers or vLLM."""
