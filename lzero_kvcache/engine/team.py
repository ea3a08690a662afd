"""Threads that compute one product together: one of them runs a search and posts products, the others help out.

They meet at counters, some dozens of times in a simulation: too often for anything that puts a thread to sleep.
"""
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from .compiling import inner
from .lanes import instructions

POSTED, FINISHED, WORKERS, JOB = 0, 8, 16, 17
"""Places in what a team shares: how many products were posted, and how many shares of all of them are done (each has a
line of memory of its own), how many threads there are, and the product."""

COUNTER_BYTES = 8

PATIENCE = 100000
"""How often a waiting thread reads the counter before it yields to others."""


def new_team(workers: int) -> np.ndarray:
    """What the threads of a team share: an empty array for a thread that is alone."""
    team = np.zeros(JOB + 9 if workers > 1 else 0, dtype=np.int64)
    team[WORKERS:JOB] = workers
    return team


def dismiss(team: np.ndarray) -> None:
    """Let the threads that help out return."""
    team[POSTED:POSTED + 1] = 2 ** 62


_INT64 = ir.IntType(64)


def _counter(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _INT64.as_pointer())


_read = instructions(
    types.int64(types.intp), lambda builder, at: builder.load_atomic(_counter(builder, at), 'acquire', COUNTER_BYTES)
)
_increment = instructions(types.int64(types.intp), lambda builder, at: builder.atomic_rmw(
    'add', _counter(builder, at), ir.Constant(_INT64, 1), 'acq_rel'
))
_let_others_run = types.ExternalFunction('sched_yield', types.int32())


@inner
def await_count(team: np.ndarray, place: int, count: int) -> int:
    """Wait until a counter has got there; where it is then."""
    address, looked = team.ctypes.data + place * COUNTER_BYTES, 0
    found = _read(address)
    while found < count:
        looked += 1
        if looked > PATIENCE:
            _let_others_run()
        found = _read(address)
    return found


@inner
def count_up(team: np.ndarray, place: int) -> None:
    """Add one. A thread that sees the new count sees all that was written before it."""
    _increment(team.ctypes.data + place * COUNTER_BYTES)
