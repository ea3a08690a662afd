"""The rows of a batch on the host: numbers to and from the device, keys, timesteps. Knows numpy and torch; no model."""
from typing import Any, List, Sequence

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


def send(device: torch.device, *arrays: np.ndarray) -> List[torch.Tensor]:
    """
    Overview:
        Several arrays in one copy to a device.
    Arguments:
        - device (:obj:`torch.device`): Where to.
        - arrays (:obj:`np.ndarray`): Those with wider numbers first.
    Returns:
        - sent (:obj:`List[torch.Tensor]`): The same numbers in the same shapes.
    """
    parts = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if device.type == 'cpu':
        return parts
    sent = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts]).to(device, non_blocking=True)
    pieces = sent.split([part.numel() * part.element_size() for part in parts])
    return [piece.view(part.dtype).view(part.shape) for piece, part in zip(pieces, parts)]


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


def steps_after(timesteps: np.ndarray, depths: Sequence[int]) -> np.ndarray:
    """
    Overview:
        The timestep of nodes ``depths [B]``, or none of them, below roots at ``timesteps [B]``.
    """
    return timesteps + (np.asarray(depths, dtype=np.int64) if len(depths) else 0)
