"""What happens when a prediction is not finite. Knows numbers on the host only."""
import logging
from typing import Callable, Sequence

import numpy as np

logger = logging.getLogger(__name__)


class NanGuard:
    """
    Overview:
        Looks at what comes back to the host anyway.
    Arguments:
        - action (:obj:`str`): 'raise' an error, or 'skip' the rows: their contexts are not stored.
        - count (:obj:`Callable[[int], None]`): Told how many rows were skipped.
        - dtype (:obj:`str`): ``kv_cache_cfg.dtype``: what float16 cannot hold comes back as inf.
    """

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
        """
        Overview:
            Tell which rows are finite.
        Arguments:
            - values (:obj:`np.ndarray`): ``[B, K]``.
            - what (:obj:`str`): What they are, for the message.
            - mode (:obj:`str`): 'collect' or 'eval'.
            - env_ids (:obj:`Sequence[int]`): The environment of each row.
            - timesteps (:obj:`np.ndarray`): The step of each environment in its episode ``[B]``.
        Returns:
            - rows (:obj:`np.ndarray`): Indices of the finite rows.
        Raises:
            - FloatingPointError: A row is not, and the action is 'raise'.
        """
        # One sum tells of almost every batch that it is finite; one that overflows is looked at more closely.
        if np.isfinite(values.sum()) or np.isfinite(values).all():
            return np.arange(len(values))
        finite = np.isfinite(values).all(axis=1)
        row = int(np.argmin(finite))
        message = f'{what} with nan or inf in {mode}, environment {env_ids[row]}, step {timesteps[row]}'
        if self._action == 'raise':
            raise FloatingPointError(
                f"{message}: {self._cause}; kv_cache_cfg.on_nan='skip' goes on without such contexts"
            )
        if not self._told:
            self._told = True
            logger.warning(f'{message}: its context is not stored; further ones are only counted')
        self._count(int(np.count_nonzero(~finite)))
        return np.flatnonzero(finite)
