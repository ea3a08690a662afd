"""Handling of predictions with nan or inf, by ``kv_cache_cfg.on_nan``. Knows numbers on the CPU only."""
import logging
from typing import Callable, Sequence

import numpy as np

logger = logging.getLogger(__name__)


class NanGuard:
    """Raises an error, or has rows skipped and calls ``count`` with how many."""

    def __init__(self, action: str, count: Callable[[int], None], dtype: str = 'float32') -> None:
        self._action, self._count = action, count
        self._cause = 'the weights have diverged'
        if dtype == 'float16':
            self._cause += ", or keys and values overflow kv_cache_cfg.dtype='float16' ('bfloat16' holds them)"
        self._told = False

    @property
    def skips(self) -> bool:
        """Whether rows with nan or inf go on without a context."""
        return self._action == 'skip'

    def finite(self, values: np.ndarray, what: str, mode: str, env_ids: Sequence[int],
               timesteps: np.ndarray) -> np.ndarray:
        """The indices of the rows of ``values [B, K]`` that are finite. The other arguments are for the message: what
        the values are, and the rows' mode, environments and timesteps ``[B]``."""
        # If the sum is finite, so are all values; a sum of finite values may overflow.
        if np.isfinite(values.sum()) or np.isfinite(values).all():
            return np.arange(len(values))
        finite = np.isfinite(values).all(axis=1)
        row = int(np.argmin(finite))
        unit = 'row' if mode == 'reanalysis' else 'environment'
        message = f'{what} with nan or inf in {mode}, {unit} {env_ids[row]}, step {timesteps[row]}'
        if self._action == 'raise':
            raise FloatingPointError(
                f"{message}: {self._cause}; kv_cache_cfg.on_nan='skip' goes on without such contexts"
            )
        if not self._told:
            self._told = True
            logger.warning(f'{message}: its context is not stored; further ones are only counted')
        self._count(int(np.count_nonzero(~finite)))
        return np.flatnonzero(finite)

    def report(self, broken: np.ndarray, mode: str, env_ids: Sequence[int], timesteps: np.ndarray) -> None:
        """:meth:`finite` for a search in arrays, which used 0 for nan and inf. ``broken [2, B]`` is how many
        predictions of each row had some, and the depth of the first."""
        counts, depths = broken
        if counts.any():
            depth = depths[np.argmax(counts > 0)]
            values = np.where(counts > 0, np.nan, 0.0)[:, None]
            self.finite(values, f'A reward, value or policy at depth {depth}', mode, env_ids, timesteps)
            self._count(int(counts.sum() - np.count_nonzero(counts)))  # each prediction counts
