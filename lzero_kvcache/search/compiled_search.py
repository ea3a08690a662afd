"""Compiled entry points on the CPU: a search in arrays, and the root inference before it. Importing it imports numba.

Rows are independent: each thread computes some of them, in working memory of its own.
"""
from typing import Any, NamedTuple

import numpy as np

from ..engine.compiled_step import begin_contexts, observe_roots, simulate
from ..engine.compiling import entry, inner
from ..engine.layers import help_out
from ..engine.program import ROWS, Batch, PagedNetwork
from .random_numbers import PhiloxKey
from .timesteps import observed_at
from .tree import Rules, Tree, backup_rows, extend_rows, parent, prepare_rows, select_rows


class SearchInputs(NamedTuple):
    """Inputs of a search, as C-contiguous arrays."""
    reward: np.ndarray  # [B] float32
    logits: np.ndarray  # [B, P] float32
    legal: np.ndarray  # [B, S] int32, see prepare_rows
    noise: np.ndarray  # [B, S] float32
    weight: np.float32  # of the noise
    tables: np.ndarray  # [B, R] int64
    counts: np.ndarray  # [B] int64
    timesteps: np.ndarray  # [B] int64
    offsets: np.ndarray  # [2] int64, see timesteps.NODE_OFFSETS


class Nodes(NamedTuple):
    """Memory of a search beside its trees."""
    batch: Batch  # the step of the current simulation
    broken: np.ndarray  # [2, B], how many predictions had nan or inf (0 was used instead), and the depth of the first
    # Of a reanalysis in which a node's context is its parent's state alone; empty in any other search:
    latents: np.ndarray  # [B, N, E], states of all nodes
    begun: Batch  # the contexts that begin with the parents' states, the same otherwise


def make_nodes(tree: Tree, policy: int, latents: np.ndarray, timesteps: np.ndarray) -> Nodes:
    """Allocate :class:`Nodes`; the model predicts ``policy`` numbers of a policy."""
    rows, _, context_pages = tree.tables.shape
    some, _, embed = latents.shape
    numbers = np.zeros((4, rows), np.int64)
    batch = Batch(
        np.zeros((rows, context_pages), np.int64), numbers[0], numbers[1], numbers[2:],
        np.zeros((rows, max(tree.draws.shape[3], 1)), np.float32), latent=np.zeros((some, embed), np.float32),
        reward=np.zeros(rows, np.float32), value=np.zeros(rows, np.float32), policy=np.zeros((rows, policy), np.float32)
    )
    begun = batch._replace(
        counts=np.zeros(some, np.int64), pages=np.arange(1, 1 + some),
        positions=np.stack([observed_at(timesteps[:some])] * 2)
    )
    return Nodes(batch, np.zeros((2, rows), np.int64), latents, begun)


@inner
def gather_rows(tree: Tree, rules: Rules, roots: SearchInputs, pages: np.ndarray, batch: Batch, lo: int,
                hi: int) -> None:
    """Fill the batch: the contexts of the selected parents, the actions taken there, and the pages ``[B]`` to write."""
    for row in range(lo, hi):
        node = parent(tree, row)
        batch.tables[row] = tree.tables[row, node]
        batch.counts[row], batch.pages[row] = tree.counts[row, node], pages[row]
        if rules.sampled:
            batch.actions[row] = tree.draws[row, node, tree.action[row]]
        else:
            batch.actions[row, 0] = tree.action[row]
        after = roots.timesteps[row] + (node if rules.index_for_depth else tree.depth[row])
        batch.positions[0, row], batch.positions[1, row] = 2 * after + roots.offsets[0], 2 * after + roots.offsets[1]


@inner
def mend_rows(tree: Tree, batch: Batch, broken: np.ndarray, lo: int, hi: int) -> None:
    """Replace nan and inf by 0, and count them."""
    for row in range(lo, hi):
        found = False
        for column in range(batch.policy.shape[1]):
            if not np.isfinite(batch.policy[row, column]):
                batch.policy[row, column] = 0
                found = True
        if not np.isfinite(batch.reward[row]):
            batch.reward[row] = 0
            found = True
        if not np.isfinite(batch.value[row]):
            batch.value[row] = 0
            found = True
        if found:
            if broken[0, row] == 0:
                broken[1, row] = tree.depth[row]
            broken[0, row] += 1


@entry
def search_rows(tree: Tree, rules: Rules, key: PhiloxKey, roots: SearchInputs, paged: PagedNetwork, pages: np.ndarray,
                nodes: Nodes, scratch: Any, begin: int, end: int, lo: int, hi: int) -> None:
    """Run simulations ``begin`` to ``end`` of rows ``lo`` to ``hi``; they write ``pages [N - 1, B]``."""
    batch, begun, reanalyzes = nodes.batch, nodes.begun, len(nodes.latents) > 0
    for low in range(lo, hi, ROWS):
        high = min(low + ROWS, hi)
        if begin == 0:
            prepare_rows(
                tree, rules, key, roots.reward, roots.logits, roots.legal, roots.noise, roots.weight, low, high
            )
            for row in range(low, high):
                tree.tables[row, 0], tree.counts[row, 0], nodes.broken[:, row] = roots.tables[row], roots.counts[row], 0
        for simulation in range(begin, end):
            select_rows(tree, rules, key, simulation, low, high)
            gather_rows(tree, rules, roots, pages[simulation], batch, low, high)
            if reanalyzes:
                for row in range(low, high):
                    batch.latent[row] = nodes.latents[row, parent(tree, row)]
                    batch.tables[row, 0], batch.counts[row] = begun.pages[row], 1
                begin_contexts(paged, begun, scratch, low, high - low)
            simulate(paged, batch, scratch, low, high - low)
            mend_rows(tree, batch, nodes.broken, low, high)
            if reanalyzes:
                for row in range(low, high):
                    nodes.latents[row, simulation + 1] = batch.latent[row]
            else:
                extend_rows(tree, batch.pages, simulation, low, high)
            backup_rows(tree, rules, key, simulation, batch.reward, batch.value, batch.policy, low, high)


@entry
def step_roots(paged: PagedNetwork, batch: Batch, begins: bool, scratch: Any, lo: int, hi: int) -> None:
    """Run rows ``lo`` to ``hi`` of a root inference; or begin contexts that are rebuilt before it."""
    for low in range(lo, hi, ROWS):
        rows = min(ROWS, hi - low)
        if begins:
            begin_contexts(paged, batch, scratch, low, rows)
        else:
            observe_roots(paged, batch, scratch, low, rows)


help_search = entry(help_out)
"""What the helping threads of a team run."""
