"""Timesteps of the ``B`` rows of a batch, from the ``start_pos`` that LightZero passes."""
from typing import Any, Sequence

import numpy as np


def timesteps_of(start_pos: Any, rows: int) -> np.ndarray:
    """LightZero's ``start_pos``, a number for all or one for each row, as ``[B]``."""
    if np.ndim(start_pos) == 0:
        return np.full(rows, int(start_pos), dtype=np.int64)
    return np.asarray(start_pos[:rows], dtype=np.int64).reshape(rows, -1)[:, 0]


def reanalysis_timesteps_of(start_pos: Any, rows: int) -> np.ndarray:
    """Timesteps ``[batch, unroll]``, with the 0 that LightZero appends to each sequence, flattened to ``[B]``; or
    ``[B]`` already."""
    if np.ndim(start_pos) > 0 and np.size(start_pos) != rows:
        start_pos = np.pad(start_pos, ((0, 0), (0, 1)))
    return timesteps_of(start_pos if np.ndim(start_pos) == 0 else np.ravel(start_pos), rows)


def steps_after(timesteps: np.ndarray, depths: Sequence[int]) -> np.ndarray:
    """The timesteps of nodes at ``depths [B]`` below roots at ``timesteps [B]``; without depths, those of the roots."""
    return timesteps + (np.asarray(depths, dtype=np.int64) if len(depths) else 0)
