"""The keys of contexts: ``B`` rows, ``E`` embedding."""
from typing import List

import numpy as np
import xxhash


def hash_rows(latent: np.ndarray) -> List[int]:
    """The key of each row ``[B, E]``: XXH3's 64 bits of its bytes."""
    return list(map(xxhash.xxh3_64_intdigest, latent))
