"""The trees in arrays against the compiled trees of the installed LightZero, which are the reference.

Forced, ours takes the step that the C++ tree took, which must be one that ours could have drawn; free, the means of
many searches agree. Statistical tests fail by chance once in a million runs or less.
"""
import logging
import random
from typing import Any, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
import pytest
import torch
from lzero.mcts.tree_search.mcts_ctree import tree_muzero
from lzero.mcts.tree_search.mcts_ctree_sampled import tree_sampled_muzero
from numba import njit
from scipy import stats

from lzero_kvcache.cache.pages import extend
from lzero_kvcache.search.draws import below, draw, normal, philox, uniform
from lzero_kvcache.search.tree import (
    Rules, Tree, backup_rows, exploration, extend_rows, make_key, make_rules, make_tree, mean_quality, pad_legal,
    prepare_rows, root_actions, root_values, root_visits, score, select_rows, share
)

LEVEL = 1e-7
"""Probability with which one statistical comparison of equals fails."""


@pytest.fixture(scope='module', autouse=True)
def quiet_numba() -> Iterator[None]:
    """DI-engine lets every logger speak, and numba tells of each instruction that it compiles."""
    logger = logging.getLogger('numba')
    level = logger.level
    logger.setLevel(logging.WARNING)
    yield
    logger.setLevel(level)


class Case(NamedTuple):
    """What a search of both trees is given."""
    rules: Rules
    simulations: int
    logits: np.ndarray  # [B, P]
    legal: List[List[int]]
    slots: int
    noise: np.ndarray  # [B, S]
    weight: float  # of the noise; 0: none
    to_play: List[int]
    action_size: int = 0

    @property
    def rows(self) -> int:
        return len(self.logits)


class Ours:
    """A search of the tree in arrays, step by step."""

    def __init__(self, case: Case, seed: int = 0, tree: Any = None, chunks: Sequence[int] = ()) -> None:
        self.case, self.key = case, make_key(seed, 0)
        bounds = [0, *chunks, case.rows]
        self.chunks = list(zip(bounds[:-1], bounds[1:]))
        self.tree: Tree = tree or make_tree(case.rows, case.simulations, case.slots, 1, case.action_size)
        legal = pad_legal(case.legal, case.slots)
        for lo, hi in self.chunks:
            prepare_rows(
                self.tree, case.rules, self.key, np.zeros(case.rows, np.float32), case.logits, legal, case.noise,
                np.float32(case.weight), lo, hi
            )

    def traverse(self, simulation: int) -> Tuple[np.ndarray, np.ndarray]:
        """Parents and actions ``[B]``, or ``[B, A]``."""
        tree, rows = self.tree, np.arange(self.case.rows)
        for lo, hi in self.chunks:
            select_rows(tree, self.case.rules, self.key, simulation, lo, hi)
        parents = tree.path[rows, tree.depth - 1]
        return parents, tree.draws[rows, parents, tree.action] if self.case.rules.sampled else tree.action.copy()

    def backpropagate(self, simulation: int, rewards: np.ndarray, values: np.ndarray, logits: np.ndarray) -> None:
        for lo, hi in self.chunks:
            backup_rows(self.tree, self.case.rules, self.key, simulation, rewards, values, logits, lo, hi)

    def visits(self) -> List[List[int]]:
        return root_visits(self.tree)

    def values(self) -> List[float]:
        return root_values(self.tree)


class Reference:
    """The same of LightZero's tree."""

    def __init__(self, case: Case) -> None:
        self.case, rules = case, case.rules
        self.lib = tree_sampled_muzero if rules.sampled else tree_muzero
        sizes = (case.action_size, case.slots, rules.continuous) if rules.sampled else ()
        self.roots = self.lib.Roots(case.rows, case.legal, *sizes)
        zeros, logits = [0.0] * case.rows, case.logits.tolist()
        if case.weight:
            self.roots.prepare(case.weight, case.noise.tolist(), zeros, logits, case.to_play)
        else:
            self.roots.prepare_no_noise(zeros, logits, case.to_play)
        self.ranges = self.lib.MinMaxStatsList(case.rows)
        self.ranges.set_delta(float(rules.delta))

    def traverse(self, simulation: int) -> Tuple[np.ndarray, np.ndarray]:
        rules = self.case.rules
        self.results = self.lib.ResultsWrapper(num=self.case.rows)
        parents, _, actions, self.players = self.lib.batch_traverse(
            self.roots, int(rules.base), float(rules.init), float(rules.discount), self.ranges, self.results,
            list(self.case.to_play), *((rules.continuous, ) if rules.sampled else ())
        )
        return np.asarray(parents), np.asarray(actions, np.float32 if rules.sampled else np.int64)

    def lengths(self) -> List[int]:
        return self.results.get_search_len()

    def backpropagate(self, simulation: int, rewards: np.ndarray, values: np.ndarray, logits: np.ndarray) -> None:
        self.lib.batch_backpropagate(
            simulation + 1, float(self.case.rules.discount), rewards.tolist(), values.tolist(), logits.tolist(),
            self.ranges, self.results, self.players
        )

    def visits(self) -> List[List[int]]:
        return self.roots.get_distributions()

    def values(self) -> List[float]:
        return self.roots.get_values()


# ---- forced --------------------------------------------------------------------------------------------------------


@njit(error_model='numpy')
def best_set(tree: Tree, rules: Rules, row: int, node: int, mean: np.float32, tolerance: np.float32) -> np.ndarray:
    """Which entries of a node's ``order`` the rule may draw, if every score may be off by half of ``tolerance``."""
    count = tree.order.shape[2]
    inside = np.zeros(count, np.bool_)
    factors = exploration(tree, rules, row, node)
    best = np.float32(-1e6)
    for index in range(count):
        slot = tree.order[row, node, index]
        if slot < 0:
            break
        bound = score(tree, rules, row, node, slot, mean, factors)
        if bound > best + tolerance:
            inside[:] = False
        if bound > best or bound >= best - np.float32(1e-6) - tolerance:
            inside[index] = True
        if bound > best:
            best = bound
    return inside


@njit(error_model='numpy')
def first_stray(tree: Tree, rules: Rules, row: int, slots: np.ndarray, tolerance: np.float32) -> int:
    """The first depth of the path at which the step to ``slots[depth]`` is none that the rule may draw; or -1."""
    above = np.float32(0)
    for depth in range(tree.depth[row]):
        node = tree.path[row, depth]
        above = mean_quality(tree, rules, row, node, above)
        inside = best_set(tree, rules, row, node, above, tolerance)
        found = not inside.any() and slots[depth] == 0  # no score is a number
        for index in range(len(inside)):
            found = found or (inside[index] and tree.order[row, node, index] == slots[depth])
        if not found:
            return depth
    return -1


def search_forced(case: Case, answers: Any, tolerance: float = 0.0) -> Tuple[Reference, Ours]:
    """Both searches with the same answers, ours along the choices of the reference."""
    reference, ours = Reference(case), Ours(case)
    tree, sampled = ours.tree, case.rules.sampled
    if sampled:  # what the reference has drawn can be seen at the roots; below, when it takes it
        tree.draws[:, 0] = np.asarray(reference.roots.get_sampled_actions(), np.float32)
        for row in range(case.rows):
            share(tree, row, 0)
    paths = [{0: []} for _ in range(case.rows)]  # of each row, by node: the nodes and slots above
    for simulation in range(case.simulations):
        parents, actions = reference.traverse(simulation)
        for row, (node, action, length) in enumerate(zip(parents.tolist(), actions, reference.lengths())):
            slot = take(tree, row, node, action) if sampled else int(action)
            steps = paths[row][node] + [(node, slot)]
            assert len(steps) == length
            tree.path[row, :length + 1] = [above for above, _ in steps] + [simulation + 1]
            tree.depth[row] = length
            slots = np.array([slot for _, slot in steps])
            assert tree.child[row, node, slot] == -1
            assert first_stray(tree, case.rules, row, slots, np.float32(tolerance)) == -1, (simulation, row, steps)
            tree.child[row, node, slot] = simulation + 1
            paths[row][simulation + 1] = steps
        given = answers(simulation, parents, actions)
        reference.backpropagate(simulation, *given)
        ours.backpropagate(simulation, *given)
        if sampled:
            tree.draws[:, simulation + 1] = np.nan
            tree.order[:, simulation + 1] = np.arange(case.slots)
            tree.prior[:, simulation + 1] = 1 / case.slots
    return reference, ours


def take(tree: Tree, row: int, node: int, action: np.ndarray) -> int:
    """The slot of a drawn action; below a root one that is new is put where none is known yet."""
    known = (tree.draws[row, node] == action).all(axis=1)
    if not known.any():
        known = np.isnan(tree.draws[row, node]).all(axis=1)
        tree.draws[row, node, known.argmax()] = action
    assert known.any()
    return int(tree.order[row, node, known.argmax()])


def random_case(rng: np.random.Generator, two_players: bool) -> Case:
    """Of one sort or another: unequal legal actions in any order, noise, one simulation, near ties, small ranges."""
    rows, slots = int(rng.integers(1, 5)), int(rng.integers(1, 8))
    legal = [rng.permutation(slots)[:rng.integers(0, slots + 1)].tolist() for _ in range(rows)]
    weight = float(rng.choice([0.0, 0.25, 1.0]))
    scale = rng.choice([3.0, 1.0, 2e-6, 0.0])
    rules = make_rules(
        int(rng.choice([19652, 10])), float(rng.choice([1.25, 0.3])), float(rng.choice([0.997, 1.0, 0.5])),
        float(rng.choice([0.01, 1.0, 0.0])), two_players
    )
    return Case(
        rules, int(rng.choice([1, 5, 25])), scale * rng.normal(size=(rows, slots)).astype(np.float32), legal, slots,
        rng.dirichlet([0.3] * slots, rows).astype(np.float32), weight,
        rng.choice([1, 2], rows).tolist() if two_players else [-1] * rows
    )


class RandomAnswers:
    """Rewards, values and logits of any size, often equal, and now and then no numbers at all."""

    def __init__(self, rng: np.random.Generator, rows: int, width: int, broken: bool) -> None:
        self.rng, self.rows, self.width, self.broken = rng, rows, width, broken
        self.offset, self.scale = rng.choice([0.0, -3.0, 50.0]), rng.choice([1.0, 0.001, 20.0])
        self.digits, self.spread = int(rng.choice([0, 1, 7])), rng.choice([3.0, 1e-6])

    def __call__(self, simulation: int, parents: np.ndarray, actions: np.ndarray) -> Tuple[np.ndarray, ...]:
        rng, rows = self.rng, self.rows
        rewards, values = np.round(self.scale * rng.normal(size=(2, rows)), self.digits).astype(np.float32)
        logits = (self.spread * rng.normal(size=(rows, self.width))).astype(np.float32)
        if self.broken:
            for array in (rewards, values, logits):
                array[rng.random(array.shape) < 0.05] = rng.choice([np.nan, np.inf, -np.inf])
        return rewards, values + np.float32(self.offset), logits


@pytest.mark.parametrize('broken', [False, True], ids=['finite', 'broken'])
@pytest.mark.parametrize('two_players', [False, True], ids=['one player', 'two players'])
def test_each_step_of_the_reference_is_one_that_ours_could_take(two_players: bool, broken: bool) -> None:
    rng = np.random.default_rng([two_players, broken])
    for _ in range(150):
        case = random_case(rng, two_players)
        reference, ours = search_forced(case, RandomAnswers(rng, case.rows, case.slots, broken))
        assert ours.visits() == reference.visits()
        np.testing.assert_allclose(ours.values(), reference.values(), rtol=1e-5, atol=1e-5)
