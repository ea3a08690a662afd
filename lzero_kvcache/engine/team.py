"""A team of threads that compute one product together: one thread runs a search and posts products, the others help.

They spin on shared counters, since they meet dozens of times in a simulation, too often to put a thread to sleep.
"""
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from .compiling import inner
from .lanes import instructions

POSTED, FINISHED, WORKERS, JOB = 0, 8, 16, 17
"""Indices into the memory that a team shares: products posted so far, shares of them done so far (each counter on a
cache line of its own), threads, and the arguments of the current product."""

COUNTER_BYTES = 8

PATIENCE = 100000
"""How often a waiting thread reads a counter before it yields the core at each further read."""


def new_team(workers: int) -> np.ndarray:
    """The shared memory of a team; empty for a thread that is alone."""
    team = np.zeros(JOB + 9 if workers > 1 else 0, dtype=np.int64)
    team[WORKERS:JOB] = workers
    return team


def dismiss(team: np.ndarray) -> None:
    """Let the helping threads return."""
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
    """Wait until a counter is at least ``count``; returns its value then."""
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
    """Add one to a counter. A thread that reads the new count sees everything written before."""
    _increment(team.ctypes.data + place * COUNTER_BYTES)
