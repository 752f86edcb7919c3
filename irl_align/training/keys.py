"""Seeds and checksums that stages are keyed by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def derive_seed(seed: int, role: str) -> int:
    """A 64-bit seed for one role, derived from the recipe's seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{role}".encode(), digest_size=8).digest())


def checksum(rows: Sequence[Sequence[int]]) -> str:
    """Checksum of rows of token ids."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray([len(row), *row], dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]
