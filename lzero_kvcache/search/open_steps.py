"""Open steps: whose rows a root inference and the search after it have, and how roots are restored when a step fails or
is abandoned."""
import itertools
import threading
from collections import deque
from contextlib import contextmanager
from typing import Any, Callable, Deque, Hashable, Iterator, List, Optional, Sequence, Set, Tuple

import numpy as np
import torch

from ..cache.base import CURRENT, PagedCacheManager
from ..cache.pages import Lease, Rows
from ..copies import MadeAnew


class OpenStep:
    """A step of some environments: their root inference and the search that follows. It owns the pages of its roots."""

    def __init__(self, mode: str, env_ids: List[int], addresses: Tuple[int, ...], lease: Lease, trace: Any,
                 in_arrays: bool = False, by_key: bool = False) -> None:
        self.mode, self.env_ids = mode, env_ids
        self.in_arrays = in_arrays  # whether the search that follows is in arrays
        self.by_key = by_key  # whether contexts of roots are found by key instead of by environment
        self.addresses = addresses  # of the weights
        self.lease = lease
        self.trace = trace  # of its validation, or None
        self.weights: Any = None  # read once, since nobody changes them inside a search
        self.shift: Any = None  # of a compiled root inference, for the search after it
        self.roots: Optional[Rows] = None
        self.before: Optional[Rows] = None  # the environments' roots before this step
        self.superseded: Set[int] = set()  # environments whose root has been replaced or cleared since
        self.kept = np.zeros(0, np.int64)  # rows whose root was stored
        self.timesteps = np.zeros(0, np.int64)  # [B]
        self.latents: Optional[torch.Tensor] = None  # [B, E], of the roots
        self.keys: Optional[Tuple[List[int], List[Hashable]]] = None  # environments and keys, if stored by key too
        self.seen: Set[Hashable] = set()  # keys of its roots and nodes, if they are stored by key
        self.visits: Sequence[Sequence[int]] = ()  # of its roots, when they have been searched
        # Of its roots' legal actions; none unless they were searched in arrays.
        self.logits: Callable[[], Sequence[Sequence[float]]] = list
        self.searches = 0  # searches in LightZero's tree that are running
        self.number = 0  # in the order in which steps were opened

    def check_rows(self, rows: int) -> None:
        if len(self.env_ids) != rows:
            raise ValueError(f'{rows} rows for {len(self.env_ids)} environments {self.env_ids}')


class StepsOfThread(MadeAnew, threading.local):
    """Open steps; each thread has its own, and so has each copy of a model or policy."""

    def __init__(self) -> None:
        self.steps: List[Any] = []

    @property
    def innermost(self) -> Any:
        """The step that was opened last, or None."""
        return self.steps[-1] if self.steps else None


class OpenSteps:
    """The open steps of one model."""

    def __init__(self, manager: PagedCacheManager, validator: Any) -> None:
        self._manager, self._validator = manager, validator
        self._open = StepsOfThread()
        self._abandoned: Deque[OpenStep] = deque()  # steps that were entered and never left
        self._numbers = itertools.count(1)

    @property
    def steps(self) -> List[OpenStep]:
        """The open steps of this thread, the innermost last."""
        return self._open.steps

    @contextmanager
    def begin(self, mode: str, env_ids: List[int], addresses: Tuple[int, ...],
              in_arrays: bool = False) -> Iterator[OpenStep]:
        """A context in which a root inference, and the search that follows, are for some environments."""
        if len(set(env_ids)) < len(env_ids):
            raise ValueError(f'an environment has two rows: {env_ids}')
        self.end_abandoned()
        trace = None if self._validator is None else self._validator.open(mode, env_ids)
        step = OpenStep(mode, env_ids, addresses, self._manager.lease(), trace, in_arrays)
        step.number = next(self._numbers)
        steps = self.steps
        steps.append(step)
        try:
            yield step
            self._forget_keys(step)
        except GeneratorExit:
            self._abandoned.append(step)  # the garbage collector may close this in the middle of anything
            raise
        except BaseException:
            self._end_failed(step)
            raise
        else:
            step.lease.release()
            self.end_abandoned(inside=step)
            for other in [*steps, *self._abandoned]:
                if other is not step and other.mode == mode:
                    other.superseded.update(env_ids)
        finally:
            steps.remove(step)

    def end_abandoned(self, inside: Optional[OpenStep] = None) -> None:
        """Undo the steps that were abandoned, the newest first; or those alone that were opened inside of another."""
        first = 0 if inside is None else inside.number
        for step in sorted(self._abandoned, key=lambda step: -step.number):
            if step.number > first:
                self._abandoned.remove(step)
                self._end_failed(step)

    def _end_failed(self, step: OpenStep) -> None:
        with step.lease:
            self._undo(step)
            self._forget_keys(step)

    def _forget_keys(self, step: OpenStep) -> None:
        if step.keys is not None:
            self._manager.forget_init(step.mode, *step.keys)

    def _undo(self, step: OpenStep) -> None:
        """Restore the roots that the environments had before a step."""
        if step.before is None:
            return
        undone = [row for row, env_id in enumerate(step.env_ids) if env_id not in step.superseded]
        if undone:
            env_ids, rows = [step.env_ids[row] for row in undone], (step.before[0][undone], step.before[1][undone])
            self._manager.store_init(step.mode, env_ids, [CURRENT] * len(undone), rows)

    def forget(self, mode: Optional[str], env_id: Optional[int]) -> None:
        """Called when roots of an environment, of a mode, or all were cleared: no open search by key may find them, and
        no failing step may restore them."""
        for step in [*self.steps, *self._abandoned]:
            if mode in (None, step.mode):
                left = [row for row in step.kept if env_id not in (None, step.env_ids[row])]
                step.kept = np.array(left, dtype=np.int64)
                step.superseded.update(step.env_ids if env_id is None else [env_id])

    def check_searchable(self, step: Optional[OpenStep]) -> OpenStep:
        """Refuse a step that this thread has not open, or that has no roots yet."""
        if step is None or step not in self.steps or step.roots is None:
            raise RuntimeError('a search follows a root inference inside `open_step`, in the same thread')
        return step

    # LightZero's code does not pass along which step an inference is of.

    def awaiting_roots(self) -> Optional[OpenStep]:
        """The step that a root inference is of; None if no open step awaits one."""
        awaiting = [step for step in self.steps if step.roots is None]
        if not awaiting:
            return None
        if awaiting != self.steps[-1:]:
            opened = ' or '.join(f'{step.env_ids} of {step.mode}' for step in self.steps)
            raise RuntimeError(
                f'a root inference could be for environments {opened}: infer the roots of one step before the next '
                'is opened'
            )
        return awaiting[0]

    def having(self, keys: Sequence[Hashable]) -> Optional[OpenStep]:
        """The step that nodes with these keys are of: the one that has seen the most, of several the innermost. If
        none has seen any, the innermost, unless it is searched by node."""
        steps = self.steps
        if len(steps) > 1:
            best = max(reversed(steps), key=lambda step: len(step.seen.intersection(keys)))
            if best.seen.intersection(keys):
                return best
        return steps[-1] if steps and not steps[-1].searches else None
