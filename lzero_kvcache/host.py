"""The rows of a batch on the host: numbers from the device, keys, timesteps. Knows numpy and torch; no model."""
from typing import Any, List

import numpy as np
import torch
import xxhash


def to_host(tensor: torch.Tensor) -> np.ndarray:
    """
    Overview:
        One copy; from a GPU to pinned memory, which takes a fraction of the time.
    """
    if not tensor.is_cuda:
        return tensor.numpy()
    copy = tensor.to('cpu', non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return copy.numpy()


def hash_rows(latent: np.ndarray) -> List[int]:
    """
    Overview:
        The key of each row.
    Arguments:
        - latent (:obj:`np.ndarray`): ``[B, E]``, each row contiguous.
    Returns:
        - keys (:obj:`List[int]`): XXH3's 64 bits of each row's bytes.
    """
    return list(map(xxhash.xxh3_64_intdigest, latent))


def timesteps_of(start_pos: Any, rows: int) -> np.ndarray:
    """
    Overview:
        LightZero's ``start_pos``, a number for all or one for each row, as ``[B]``.
    """
    if np.ndim(start_pos) == 0:
        return np.full(rows, int(start_pos), dtype=np.int64)
    return np.asarray(start_pos[:rows], dtype=np.int64).reshape(rows, -1)[:, 0]


def reanalysis_timesteps_of(start_pos: Any, rows: int) -> np.ndarray:
    """
    Overview:
        Timesteps ``[batch, unroll]`` with the 0 that LightZero appends to each sequence, as one row ``[B]``.
    """
    if np.ndim(start_pos) == 0:
        return np.full(rows, int(start_pos), dtype=np.int64)
    start_pos = np.asarray(start_pos)
    return np.pad(start_pos, ((0, 0), (0, 1))).reshape(-1).astype(np.int64)
