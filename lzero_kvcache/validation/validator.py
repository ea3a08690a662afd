"""Replays searches on the host's reference, judges how the answers differ, and reports it."""
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from functools import partial
from typing import Any, Callable, FrozenSet, List, NamedTuple, Optional, Sequence

import numpy as np
import torch

from ..config import CacheConfig
from .tally import QUANTITIES, Tally, differences_of
from .trace import Answer, Node, Trace

logger = logging.getLogger(__name__)

Causes = FrozenSet[str]
NO_CAUSE: Causes = frozenset()


class ValidationError(RuntimeError):
    """
    Overview:
        An answer of the new system is another than LightZero's own code gives, and nothing that is known explains it.
    """


class Reply(NamedTuple):
    """A reference's answer to one inference, and for each row why it may be wrong itself."""
    answer: Optional[Answer]  # None where the reference failed
    causes: List[Causes]  # [B]


class Reference(ABC):
    """The interface of a reference: a model with the same weights and its own contexts, to replay searches on."""
    causes: Sequence[str] = ()  # all that its replies may name
    lost = 0  # root contexts that it had, and the cache should have had

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether answers can be repeated, which they cannot with dropout."""

    @abstractmethod
    def root(self, trace: Trace) -> Reply:
        """Answer the root inference of a search."""

    @abstractmethod
    def expand(self, trace: Trace, node: Node) -> Reply:
        """Answer the next simulation of the same search."""

    @abstractmethod
    def finish(self, trace: Trace, actions: Sequence[Any]) -> None:
        """End the search, after which the environments do ``actions``."""

    @abstractmethod
    def scalar(self, logits: torch.Tensor) -> torch.Tensor:
        """The numbers ``[B, 1]`` that logits over a support stand for."""

    @abstractmethod
    def forget(self, mode: Optional[str], env_id: Optional[int]) -> None:
        """Forget the root contexts of an environment, of a mode, or all."""

    @abstractmethod
    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Follow a reset of the policy."""

    @abstractmethod
    def precompute(self) -> None:
        """Called where LightZero makes its tables of positions."""


class Validator:
    """Has the reference answer every root inference of a world model, and every ``validation_freq``-th search whole.
    Copies of the world model have no validator."""

    def __init__(self, options: CacheConfig, make_reference: Callable[[], Reference]) -> None:
        self._options = options
        self.reference = make_reference()
        self.tally = Tally(options.validation_tol, self.reference.causes)
        self._searches = 0
        self._told = False

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy is None

    def open(self, mode: str, env_ids: List[int]) -> Trace:
        """A search starts; it notes in the trace what it does."""
        self._searches += 1
        return Trace(mode, env_ids, self._searches, self._searches % self._options.validation_freq == 0)

    def reset(self, trace: Optional[Trace], *args: Any, **kwargs: Any) -> None:
        """Follow a reset of the policy: now, or, if it comes inside a search, when that search has been checked."""
        reset = partial(self.reference.reset, *args, **kwargs)
        if trace is None:
            reset()
        else:
            trace.resets.append(reset)

    @torch.no_grad()
    def check(self, trace: Trace, actions: Sequence[Any]) -> None:
        """Judge a search that is over, and whose environments do ``actions``. With ``validation_action`` 'raise' an
        unexplained difference is a ``ValidationError``."""
        if trace.root is None or not self.reference.is_ready():
            return
        start = time.perf_counter()
        self._judge(trace, self._replay(trace, actions))
        self.tally.searches += trace.replayed
        self.tally.lost = self.reference.lost
        self.tally.seconds += time.perf_counter() - start

    def _replay(self, trace: Trace, actions: Sequence[Any]) -> List[Reply]:
        replies = [self.reference.root(trace)]
        for node in trace.nodes:
            if replies[-1].answer is None:
                break
            replies.append(self.reference.expand(trace, node))
        self.reference.finish(trace, actions)
        for reset in trace.resets:
            reset()
        return replies

    def _judge(self, trace: Trace, replies: List[Reply]) -> None:
        assert trace.root is not None
        if replies[-1].answer is None:
            self.tally.add_failure(replies.pop().causes)
        theirs = [reply.answer for reply in replies if reply.answer is not None]
        if not theirs:
            return
        ours = [trace.root, *(node.answer for node in trace.nodes)]
        theirs = [self._as_numbers(answer, like) for answer, like in zip(theirs, ours)]
        differences, causes = differences_of(ours, theirs), [reply.causes for reply in replies]
        over, unexplained = self.tally.add(differences, causes)
        if unexplained.any() and self._options.validation_action == 'raise':
            raise ValidationError(
                f'kv_cache_cfg.validation={self._options.validation!r}: {_worst(trace, differences, unexplained)}, '
                f'more than kv_cache_cfg.validation_tol={self._options.validation_tol:g}'
            )
        if trace.replayed or (unexplained.any() and not self._told):
            self._log(trace, differences, causes, over, unexplained)

    def _as_numbers(self, answer: Answer, like: Answer) -> Answer:
        """The reference's answer, with numbers for logits where the search has numbers."""
        return {
            name: self.reference.scalar(part) if name in ('reward', 'value') and like[name].shape[1] == 1 else part
            for name, part in answer.items()
        }

    def _log(self, trace: Trace, differences: np.ndarray, causes: List[List[Causes]], over: np.ndarray,
             unexplained: np.ndarray) -> None:
        is_wrong, tolerance = bool(unexplained.any()), self._options.validation_tol
        self._told |= is_wrong
        line = f'Validation {self._options.validation!r}, search {trace.number}: {over.sum()} of {over.size} rows ' \
               f'over {tolerance:g}'
        if over.any():
            counts = Counter(cause for index, row in np.argwhere(over) for cause in causes[index][row])
            counts['unexplained'] = int(unexplained.sum())
            line += f' ({", ".join(f"{cause} {count}" for cause, count in counts.most_common() if count)}); the ' \
                    f'largest: {_worst(trace, differences, unexplained if is_wrong else over)}'
        shown = over.any() or not self.tally.searches  # the first line shows that validation is on
        logger.log(logging.WARNING if is_wrong else logging.INFO if shown else logging.DEBUG, line)


def _worst(trace: Trace, differences: np.ndarray, among: np.ndarray) -> str:
    """Where and by how much an answer differs most."""
    differences = np.where(among, differences, np.nan)
    quantity, index, row = map(int, np.unravel_index(np.nanargmax(differences), differences.shape))
    node = 'the root' if index == 0 else f'simulation {index}'
    return f'in {trace.mode}, environment {trace.env_ids[row]}, step {trace.timesteps[row]}, {node}: ' \
           f'{QUANTITIES[quantity]} differs by {differences[quantity, index, row]:.2g}'
