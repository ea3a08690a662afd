"""What is called on the CPU: a whole search, which joins the trees in arrays and the model's step; and the step to its
roots. Importing it imports numba.

Rows of a batch are independent, so that threads can have some each, with memory of their own for the step.
"""
from typing import Any, NamedTuple

import numpy as np

from ..engine.compiled import begin_contexts, observe_roots, simulate
from ..engine.compiling import entry, inner
from ..engine.layers import ROWS, help_out
from .tree import Key, Rules, Tree, backup_rows, extend_rows, parent, prepare_rows, select_rows


class Roots(NamedTuple):
    """What a search begins with; arrays are whole and in C's order, and in the types that are named."""
    reward: np.ndarray  # [B] float32
    logits: np.ndarray  # [B, P] float32
    legal: np.ndarray  # [B, S] int32, see prepare_rows
    noise: np.ndarray  # [B, S] float32
    weight: np.float32  # of the noise
    tables: np.ndarray  # [B, R] int64
    counts: np.ndarray  # [B] int64
    timesteps: np.ndarray  # [B] int64
    angles: np.ndarray  # [2] int64, rotary positions of an action and of what follows, from twice their timestep on


class Batch(NamedTuple):
    """What goes into the model's step and comes out of it, row by row; for the next search to write over."""
    tables: np.ndarray  # [B, R], the contexts of the nodes that are stepped from
    counts: np.ndarray  # [B]
    actions: np.ndarray  # [B, 1] numbers of actions, or [B, A] continuous ones
    places: np.ndarray  # [2, B], rotary positions of the two tokens
    reward: np.ndarray  # [B]
    value: np.ndarray  # [B]
    policy: np.ndarray  # [B, P]
    broken: np.ndarray  # [2, B], how many predictions were no numbers, for which the search went on with zeros; and the
    # depth of the first


class RootBatch(NamedTuple):
    """What goes into a root inference and comes out of it, row by row; see :func:`observe_roots`."""
    tables: np.ndarray  # [B, R]
    counts: np.ndarray  # [B]
    pages: np.ndarray  # [B]
    actions: np.ndarray  # [B, 1] or [B, A] float32
    places: np.ndarray  # [2, B]
    observations: np.ndarray  # [B, O], or [0, 0]
    sequence: np.ndarray  # [B, E]
    latent: np.ndarray  # [B, E]
    value: np.ndarray  # [B, S]
    policy: np.ndarray  # [B, P]


class States(NamedTuple):
    """Of a reanalysis whose nodes have no context but the state before them; empty in any other search."""
    latents: np.ndarray  # [B, N, E], of all nodes
    latent: np.ndarray  # [B, E], of those that are stepped from, and then of those that are added
    pages: np.ndarray  # [B], where the contexts are that begin with them
    places: np.ndarray  # [B], their rotary positions
    counts: np.ndarray  # [B], zeros


def make_batch(tree: Tree, policy: int) -> Batch:
    """Arrays for searches in a tree whose model predicts ``policy`` numbers of a policy."""
    rows, _, pages = tree.tables.shape
    return Batch(
        np.zeros((rows, pages), np.int64), np.zeros(rows, np.int64),
        np.zeros((rows, max(tree.draws.shape[3], 1)), np.float32), np.zeros((2, rows), np.int64),
        np.zeros(rows, np.float32), np.zeros(rows, np.float32), np.zeros((rows, policy), np.float32),
        np.zeros((2, rows), np.int64)
    )


def make_states(latents: np.ndarray, timesteps: np.ndarray) -> States:
    """For such a reanalysis of roots at timesteps ``[B]`` with room for ``latents [B, N, E]``; or for any other search,
    if there are none."""
    rows, _, embed = latents.shape
    return States(
        latents, np.zeros((rows, embed), np.float32), np.arange(1, rows + 1), 2 * timesteps[:rows],
        np.zeros(rows, np.int64)
    )


@inner
def gather_rows(tree: Tree, rules: Rules, roots: Roots, batch: Batch, lo: int, hi: int) -> None:
    """What the step needs of the nodes that were selected."""
    for row in range(lo, hi):
        node = parent(tree, row)
        batch.tables[row] = tree.tables[row, node]
        batch.counts[row] = tree.counts[row, node]
        if rules.sampled:
            batch.actions[row] = tree.draws[row, node, tree.action[row]]
        else:
            batch.actions[row, 0] = tree.action[row]
        after = roots.timesteps[row] + (node if rules.index_for_depth else tree.depth[row])
        batch.places[0, row], batch.places[1, row] = 2 * after + roots.angles[0], 2 * after + roots.angles[1]


@inner
def begin_rows(tree: Tree, network: Any, shift: np.ndarray, slab: np.ndarray, batch: Batch, states: States,
               scratch: Any, lo: int, hi: int) -> None:
    """Contexts that begin with the states of the nodes that were selected."""
    for row in range(lo, hi):
        states.latent[row] = states.latents[row, parent(tree, row)]
        batch.tables[row, 0], batch.counts[row] = states.pages[row], 1
    begin_contexts(
        network, shift, slab, batch.tables, states.counts, states.pages, states.places, scratch, lo, hi - lo,
        states.latent
    )


@inner
def mend_rows(tree: Tree, batch: Batch, lo: int, hi: int) -> None:
    """Zeros for what is no number."""
    for row in range(lo, hi):
        broken = False
        for column in range(batch.policy.shape[1]):
            if not np.isfinite(batch.policy[row, column]):
                batch.policy[row, column] = 0
                broken = True
        if not np.isfinite(batch.reward[row]):
            batch.reward[row] = 0
            broken = True
        if not np.isfinite(batch.value[row]):
            batch.value[row] = 0
            broken = True
        if broken:
            if batch.broken[0, row] == 0:
                batch.broken[1, row] = tree.depth[row]
            batch.broken[0, row] += 1


@entry
def search_rows(tree: Tree, rules: Rules, key: Key, roots: Roots, network: Any, shift: np.ndarray, slab: np.ndarray,
                pages: np.ndarray, batch: Batch, states: States, scratch: Any, begin: int, end: int, lo: int,
                hi: int) -> None:
    """Simulations ``begin`` to ``end`` of rows ``lo`` to ``hi``. ``pages [N - 1, B]`` are what simulations write; the
    rest is as :func:`simulate` takes it."""
    reanalyzes = len(states.latent) > 0
    for low in range(lo, hi, ROWS):
        high = min(low + ROWS, hi)
        if begin == 0:
            prepare_rows(
                tree, rules, key, roots.reward, roots.logits, roots.legal, roots.noise, roots.weight, low, high
            )
            for row in range(low, high):
                tree.tables[row, 0], tree.counts[row, 0], batch.broken[:, row] = roots.tables[row], roots.counts[row], 0
        for simulation in range(begin, end):
            select_rows(tree, rules, key, simulation, low, high)
            gather_rows(tree, rules, roots, batch, low, high)
            if reanalyzes:
                begin_rows(tree, network, shift, slab, batch, states, scratch, low, high)
            simulate(
                network, shift, slab, batch.tables, batch.counts, pages[simulation], batch.actions, batch.places,
                scratch, low, high - low, batch.reward, batch.value, batch.policy, states.latent
            )
            mend_rows(tree, batch, low, high)
            if reanalyzes:
                for row in range(low, high):
                    states.latents[row, simulation + 1] = states.latent[row]
            else:
                extend_rows(tree, pages[simulation], simulation, low, high)
            backup_rows(tree, rules, key, simulation, batch.reward, batch.value, batch.policy, low, high)


@entry
def step_roots(network: Any, shift: np.ndarray, slab: np.ndarray, batch: RootBatch, begins: bool, scratch: Any, lo: int,
               hi: int) -> None:
    """Rows ``lo`` to ``hi`` of a root inference; or contexts that begin anew before it, with what ``latent`` gives."""
    for low in range(lo, hi, ROWS):
        rows = min(ROWS, hi - low)
        if begins:
            begin_contexts(
                network, shift, slab, batch.tables, batch.counts, batch.pages, batch.places[1], scratch, low, rows,
                batch.latent
            )
        else:
            observe_roots(
                network, shift, slab, batch.tables, batch.counts, batch.pages, batch.actions, batch.places,
                batch.observations, scratch, low, rows, batch.sequence, batch.latent, batch.value, batch.policy
            )


help_search = entry(help_out)
"""What the other threads of a team run meanwhile."""
