"""What happens when a prediction is not finite. Knows numbers on the CPU only."""
import logging
from typing import Callable, Sequence

import numpy as np

logger = logging.getLogger(__name__)


class NanGuard:
    """Does what ``kv_cache_cfg.on_nan`` says: it raises an error, or has rows skipped, and counts them by ``count``."""

    def __init__(self, action: str, count: Callable[[int], None], dtype: str = 'float32') -> None:
        self._action, self._count = action, count
        self._cause = 'the weights have diverged'
        if dtype == 'float16':
            self._cause += ", or keys and values overflow kv_cache_cfg.dtype='float16' ('bfloat16' holds them)"
        self._told = False

    @property
    def skips(self) -> bool:
        """Whether rows that are not finite go on without a context."""
        return self._action == 'skip'

    def finite(self, values: np.ndarray, what: str, mode: str, env_ids: Sequence[int],
               timesteps: np.ndarray) -> np.ndarray:
        """The indices of the rows of ``values [B, K]`` that are finite. The rest is for the message: what the values
        are, and the mode, environments and steps in their episodes ``[B]`` that they belong to."""
        # A finite sum is enough, as almost always; only a sum that overflows takes a closer look.
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
        """:meth:`finite` for a whole search, which went on with zeros where predictions were not. ``broken [2, B]`` are
        how many of each row, and the depth of the first."""
        counts, depths = broken
        if counts.any():
            depth = depths[np.argmax(counts > 0)]
            values = np.where(counts > 0, np.nan, 0.0)[:, None]
            self.finite(values, f'A reward, value or policy at depth {depth}', mode, env_ids, timesteps)
            self._count(int(counts.sum() - np.count_nonzero(counts)))  # each prediction counts
