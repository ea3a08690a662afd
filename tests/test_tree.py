"""The trees in arrays against the compiled trees of the installed LightZero, which are the reference.

Forced, ours takes the step that the C++ tree took, which must be one that ours could have drawn; free, the means of
many searches agree. Statistical tests fail by chance once in a million runs or less.
"""
import random
from typing import Any, List, NamedTuple, Sequence, Tuple

import numpy as np
import pytest
import torch
from lzero.mcts.tree_search.mcts_ctree import tree_muzero
from lzero.mcts.tree_search.mcts_ctree_sampled import tree_sampled_muzero
from numba import njit
from recorded_choices import make_rules
from scipy import stats

from lzero_kvcache.cache.pages import extend
from lzero_kvcache.engine.compiling import entry
from lzero_kvcache.search import random_numbers as numbers
from lzero_kvcache.search import tree as trees
from lzero_kvcache.search.tree import (
    Rules,
    Tree,
    make_key,
    make_tree,
    mean_quality,
    root_actions,
    root_values,
    root_visits,
    score_children,
)
from lzero_kvcache.search.tree_arrays import padded

below, draw, normal, philox, uniform = map(
    entry, (numbers.below, numbers.draw, numbers.normal, numbers.philox, numbers.uniform)
)
prepare_rows, select_rows, extend_rows, backup_rows, share = map(
    entry, (trees.prepare_rows, trees.select_rows, trees.extend_rows, trees.backup_rows, trees.share)
)

LEVEL = 1e-7
"""Probability with which one statistical comparison of equals fails."""


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
        legal = padded([[]] * case.rows if case.rules.sampled else case.legal, case.slots, -1, np.int32)
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
        rules, options = self.case.rules, ()
        if rules.sampled or not rules.draws_ties:  # the first of equals: LightZero's main branch alone
            options = (rules.continuous, ) if rules.sampled else (True, )
        self.results = self.lib.ResultsWrapper(num=self.case.rows)
        parents, _, actions, self.players = self.lib.batch_traverse(
            self.roots, int(rules.base), float(rules.init), float(rules.discount), self.ranges, self.results,
            list(self.case.to_play), *options
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
def best_set(scores: np.ndarray, tolerance: np.float32) -> np.ndarray:
    """Which scores the rule may draw, if each may be off by half of ``tolerance``: the list is begun anew with each new
    maximum, and joined by what is within 1e-6 of it."""
    inside = np.zeros(len(scores), np.bool_)
    best = np.float32(-1e6)
    for index, score in enumerate(scores):
        if score > best + tolerance:
            inside[:] = False
        inside[index] = score > best or score >= best - np.float32(1e-6) - tolerance
        if score > best:
            best = score
    return inside


@njit(error_model='numpy')
def first_stray(tree: Tree, rules: Rules, row: int, slots: np.ndarray, tolerance: np.float32) -> int:
    """The first depth of the path at which the step to ``slots[depth]`` is none that the rule may draw; or -1."""
    above = np.float32(0)
    for depth in range(tree.depth[row]):
        node = tree.path[row, depth]
        above = mean_quality(tree, rules, row, node, above)
        inside = best_set(tree.scores[row, :score_children(tree, rules, row, node, above)], tolerance)
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
            share(tree.draws[row, 0], tree.order[row, 0], tree.prior[row, 0])
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
    for _ in range(300):
        case = random_case(rng, two_players)
        reference, ours = search_forced(case, RandomAnswers(rng, case.rows, case.slots, broken))
        assert ours.visits() == reference.visits()
        np.testing.assert_allclose(ours.values(), reference.values(), rtol=1e-5, atol=1e-5)


def test_sampled_trees_take_steps_of_the_reference_too() -> None:
    """Actions of which some are equal at the roots, where clamped ones are; below, all of them differ."""
    rng = np.random.default_rng(0)
    shared = 0
    for turn in range(400):
        case = sampled_case(rng, continuous=turn % 3 > 0, two_players=turn % 2 > 0)
        reference, ours = search_forced(case, SampledAnswers(rng, case), tolerance=4e-6)
        assert ours.visits() == reference.visits()
        np.testing.assert_allclose(ours.values(), reference.values(), rtol=1e-5, atol=1e-5)
        assert np.array_equal(root_actions(ours.tree), reference.roots.get_sampled_actions())
        shared += (ours.tree.order[:, 0] != np.arange(case.slots)).sum()
    assert shared > 100


def sampled_case(rng: np.random.Generator, continuous: bool, two_players: bool = False, rows: int = 3) -> Case:
    """Roots of which one has its actions clamped in all parts or in one, where continuous."""
    slots, size = int(rng.integers(1, 7)), 2 if continuous else 1
    actions = slots + int(rng.integers(0, 3))
    logits = rng.normal(size=(rows, 2 * size if continuous else actions)).astype(np.float32)
    if continuous:
        logits[:, size:] = rng.uniform(0.2, 1, (rows, size))
        logits[0, :size] = 9, rng.choice([9, -3.9, 0.5])
    return Case(
        make_rules(two_players=two_players, sampled=True, continuous=continuous), int(rng.choice([1, 10, 25])), logits,
        [[-1] * slots] * rows if continuous else [list(range(actions))] * rows, slots,
        rng.dirichlet([0.3] * slots, rows).astype(np.float32), float(rng.choice([0, 0.25])),
        [int(rng.choice([1, 2])) for _ in range(rows)] if two_players else [-1] * rows, size
    )


class SampledAnswers:
    """Rewards and values of any size; policies whose draws are not clamped."""

    def __init__(self, rng: np.random.Generator, case: Case) -> None:
        self.rng, self.case = rng, case

    def __call__(self, simulation: int, parents: np.ndarray, actions: np.ndarray) -> Tuple[np.ndarray, ...]:
        rng, case = self.rng, self.case
        rewards, values = rng.normal(size=(2, case.rows)).astype(np.float32)
        logits = rng.normal(scale=0.5, size=case.logits.shape).astype(np.float32)
        if case.rules.continuous:
            logits[:, case.action_size:] = rng.uniform(0.2, 0.6, (case.rows, case.action_size))
        return rewards, values, logits


# ---- free ----------------------------------------------------------------------------------------------------------


class HashedAnswers:
    """A model whose answers differ by node: they are a hash of the actions on the path from the root."""

    def __init__(self, rows: int, simulations: int, width: int) -> None:
        self.width, self.rows = width, np.arange(rows)
        self.paths = np.zeros((rows, simulations + 1), np.uint64)

    def __call__(self, simulation: int, parents: np.ndarray, actions: np.ndarray) -> Tuple[np.ndarray, ...]:
        path = mix(self.paths[self.rows, parents] * np.uint64(31) + actions.astype(np.uint64) + np.uint64(1))
        self.paths[:, simulation + 1] = path
        numbers = np.stack([mix(path + np.uint64(index)) for index in range(self.width + 2)], axis=1)
        numbers = (numbers >> np.uint64(40)).astype(np.float32) / 2 ** 24 * 2 - 1
        return numbers[:, 0], numbers[:, 1], 2 * numbers[:, 2:]


def mix(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's last steps."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def search_freely(search: Any, answers: Any) -> np.ndarray:
    """Visits and value of each root ``[B, S + 1]``, after a search by its own draws."""
    for simulation in range(search.case.simulations):
        parents, actions = search.traverse(simulation)
        search.backpropagate(simulation, *answers(simulation, parents, actions))
    return np.concatenate([np.asarray(search.visits(), float), np.reshape(search.values(), (-1, 1))], axis=1)


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether no column's mean differs (Welch's test, at ``LEVEL`` for each)."""
    certain = one.std(axis=0) + other.std(axis=0) < 1e-5
    if not np.allclose(one[:, certain].mean(axis=0), other[:, certain].mean(axis=0), atol=1e-5):
        return False
    with np.errstate(invalid='ignore'):
        return not (stats.ttest_ind(one, other, equal_var=False).pvalue[~certain] < LEVEL).any()


def plain_case(rows: int, logits: Sequence[float], simulations: int, legal: Sequence[int] = (), init: float = 1.25,
               weight: float = 0.0) -> Case:
    """The same root in every row."""
    slots = len(logits)
    return Case(
        make_rules(init=init), simulations, np.tile(np.float32(logits), (rows, 1)),
        [list(legal)] * rows, slots, np.tile(np.float32(np.arange(slots) == 1), (rows, 1)), weight, [-1] * rows
    )


def means_of(case: Case, kind: Any) -> np.ndarray:
    return search_freely(kind(case), HashedAnswers(case.rows, case.simulations, case.slots))


@pytest.mark.parametrize('case', [
    plain_case(1500, [0.3, 0, 0.1, -0.5], 12),
    plain_case(1500, [0, 0, 0], 25, weight=0.25),
    plain_case(1500, [0, 5, 0, 1, 0], 6, legal=[4, 0, 2]),
    plain_case(1500, [0, 4e-6, 1e-6, 3e-6, 2e-6, 0], 2),
], ids=['logits', 'noise', 'legal', 'near ties'])
def test_free_searches_agree_in_their_means(case: Case) -> None:
    ours, reference = means_of(case, Ours), means_of(case, Reference)
    assert (ours.std(axis=0) > 0).any()  # or nothing was drawn
    assert alike(ours, reference)


def test_the_comparison_of_means_sees_a_difference() -> None:
    base = plain_case(1500, [0.3, 0, 0.1, -0.5], 12)
    for other in (plain_case(1500, [0.3, 0, 0.1, -0.5], 12, init=0.9), plain_case(1500, [0.7, 0, 0.1, -0.5], 12)):
        assert not alike(means_of(base, Ours), means_of(other, Reference))


class ActionAnswers:
    """A model of sampled trees: what is predicted goes by the step's action."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, simulation: int, parents: np.ndarray, actions: np.ndarray) -> Tuple[np.ndarray, ...]:
        first = actions[:, 0]
        columns = np.arange(self.case.logits.shape[1], dtype=np.float32)
        logits = 0.5 + 0.5 * np.sin(first[:, None] + columns)  # deviations are positive
        return np.sin(3 * first), np.cos(2 * first), logits.astype(np.float32)


def sampled_marginals(search: Any, answers: Any) -> np.ndarray:
    """Of each root its visits, its value and its drawn actions; of each node how often an action was tried there, and
    the sums of these actions and of their squares."""
    nodes = np.zeros((search.case.rows, search.case.simulations, 1 + 2 * search.case.action_size))

    def noted(simulation: int, parents: np.ndarray, actions: np.ndarray) -> Tuple[np.ndarray, ...]:
        ones = np.ones((len(actions), 1))
        nodes[np.arange(len(actions)), parents] += np.concatenate([ones, actions, actions ** 2], axis=1)
        return answers(simulation, parents, actions)

    found = search_freely(search, noted)
    actions = np.asarray(root_actions(search.tree) if isinstance(search, Ours) else search.roots.get_sampled_actions())
    visits = found[:, :-1]
    likeliest = np.take_along_axis(actions[:, :, 0], visits.argmax(axis=1)[:, None], axis=1)
    parts = found, visits.max(axis=1, keepdims=True), likeliest, actions[:, 0], nodes.reshape(len(nodes), -1)
    return np.concatenate(parts, axis=1)


def free_sampled_case(continuous: bool, rows: int) -> Case:
    logits = [0.2, -0.1, 0.5, 0.8] if continuous else [0.5, 0, 3, -2, 1]
    rules = make_rules(sampled=True, continuous=continuous)
    return Case(
        rules, 8, np.tile(np.float32(logits), (rows, 1)), [[-1] * 3] * rows, 3, np.zeros((rows, 3), np.float32), 0.0,
        [-1] * rows, 2 if continuous else 1
    )


SAMPLED = pytest.mark.parametrize('continuous', [False, True], ids=['discrete', 'continuous'])


@SAMPLED
def test_free_searches_of_sampled_trees_agree_in_their_means(continuous: bool) -> None:
    """Of a row at a time, since the reference seeds each expansion by the clock, so that rows resemble each other."""
    one_row, many = free_sampled_case(continuous, 1), free_sampled_case(continuous, 6000)
    answers = ActionAnswers(one_row)
    reference = np.concatenate([sampled_marginals(Reference(one_row), answers) for _ in range(1500)])
    assert alike(sampled_marginals(Ours(many), answers), reference)

    def other_below(simulation: int, parents: np.ndarray, actions: np.ndarray) -> Tuple[np.ndarray, ...]:
        rewards, values, logits = answers(simulation, parents, actions)
        logits[:, -1] += 1
        return rewards, values, logits

    assert not alike(sampled_marginals(Ours(many), other_below), reference)


@SAMPLED
def test_actions_below_a_root_are_drawn_from_their_nodes_policy(continuous: bool) -> None:
    """The first action that is tried at the first node below a root, after the action that led there."""

    def first_two(search: Any) -> np.ndarray:  # [B, 2, A]; rows that try none at that node are left out
        answers, steps = ActionAnswers(search.case), []

        def noted(simulation: int, parents: np.ndarray, actions: np.ndarray) -> Tuple[np.ndarray, ...]:
            steps.append((parents, actions.copy()))
            return answers(simulation, parents, actions)

        search_freely(search, noted)
        parents, actions = np.array([step[0] for step in steps]), np.array([step[1] for step in steps])
        tried = (parents == 1).any(axis=0)
        second = actions[(parents == 1).argmax(axis=0), np.arange(len(tried))]
        return np.stack([actions[0], second], axis=1)[tried]

    one_row = free_sampled_case(continuous, 1)
    ours = first_two(Ours(free_sampled_case(continuous, 6000)))
    reference = np.concatenate([first_two(Reference(one_row)) for _ in range(1500)])
    assert min(len(ours), len(reference)) > 500
    if continuous:
        policies = [ActionAnswers(one_row)(0, led[:, 0, 0], led[:, 0])[2] for led in (ours, reference)]
        one, other = [
            ((np.arctanh(led[:, 1]) - policy[:, :2]) / policy[:, 2:]).ravel()
            for led, policy in zip((ours, reference), policies)
        ]
        assert stats.kstest(one, 'norm').pvalue > LEVEL and stats.ks_2samp(one, other).pvalue > LEVEL
    else:
        pairs = [(5 * led[:, 0, 0] + led[:, 1, 0]).astype(int) for led in (ours, reference)]
        table = np.array([np.bincount(led, minlength=25) for led in pairs])
        assert stats.chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue > LEVEL


# ---- draws ---------------------------------------------------------------------------------------------------------


def test_philox_gives_the_known_answers() -> None:
    """Of Random123's kat_vectors."""
    pi = (0xa4093822, 0x299f31d0), (0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344)
    ones = 0xffffffff
    for key, counter, words in (
        ((0, 0), (0, 0, 0, 0), (0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8)),
        ((ones, ones), (ones, ones, ones, ones), (0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd)),
        (*pi, (0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1)),
    ):
        assert philox(tuple(map(np.uint32, key)), tuple(map(np.uint32, counter))) == words


def test_draws_have_the_distributions_that_they_are_said_to_have() -> None:
    key = make_key(3, 4)
    words = [draw(key, row, 7, index, 1) for row in range(200) for index in range(50)]
    assert stats.kstest([uniform(word) for word in words], 'uniform').pvalue > LEVEL
    assert stats.kstest([normal(word) for word in words], 'norm').pvalue > LEVEL
    assert stats.chisquare(np.bincount([below(word[0], 7) for word in words])).pvalue > LEVEL
    assert below(np.uint32(0xffffffff), 7) == 6 and below(np.uint32(0), 7) == 0


def roots_drawn(kind: Any, logits: Sequence[float], slots: int, continuous: bool, rows: int) -> np.ndarray:
    """The actions of roots ``[rows, S, A]``."""
    size = len(logits) // 2 if continuous else 1
    case = Case(
        make_rules(sampled=True, continuous=continuous), 1, np.tile(np.float32(logits), (rows, 1)),
        [[-1] * slots] * rows, slots, np.zeros((rows, slots), np.float32), 0.0, [-1] * rows, size
    )
    search = kind(case)
    return np.asarray(root_actions(search.tree) if kind is Ours else search.roots.get_sampled_actions())


def test_continuous_actions_are_tanh_of_clamped_normal_draws() -> None:
    logits = [0.3, -3.5, 0.8, 1.5]
    ours = roots_drawn(Ours, logits, 10, True, 500)
    # The reference seeds by the clock, to which the first draws of its generator stay close.
    reference = roots_drawn(Reference, logits, 14, True, 500)[:, 4:]
    for part in (0, 1):
        one, other = ours[..., part].ravel(), reference[..., part].ravel()
        assert stats.ks_2samp(one, other).pvalue > LEVEL
        assert abs(one).max() <= np.float32(np.tanh(4)) == abs(ours[..., 1]).max()
        inside = one[abs(one) < np.float32(np.tanh(4))]
        assert stats.kstest(np.arctanh(inside), stats.truncnorm(
            (-4 - logits[part]) / logits[2 + part], (4 - logits[part]) / logits[2 + part], logits[part],
            logits[2 + part]
        ).cdf).pvalue > LEVEL


@pytest.mark.parametrize('logits', [[0.0, 1.0, -1.0, 0.5, 2.0], [9.0, 0.0, -1.0, 1.0, 0.5]], ids=['flat', 'peaked'])
def test_discrete_actions_are_drawn_without_replacement(logits: List[float]) -> None:
    ours = roots_drawn(Ours, logits, 3, False, 8000)[..., 0]
    reference = np.concatenate([roots_drawn(Reference, logits, 3, False, 4)[..., 0] for _ in range(4000)])
    assert (np.diff(np.sort(ours, axis=1), axis=1) > 0).all()
    for place in range(3):
        table = [np.bincount(drawn[:, place].astype(int), minlength=5) for drawn in (ours, reference)]
        table = np.array(table)[:, np.sum(table, axis=0) > 0]
        assert stats.chi2_contingency(table).pvalue > LEVEL


def test_equal_actions_share_a_child() -> None:
    order, prior = np.zeros(5, np.int32), np.zeros(5, np.float32)
    draws = np.array([[0.1, 0.2], [0.10000004, 0.2], [0.1, 0.200001], [0.1, 0.2], [0.1, -0.2]], np.float32)
    share(draws, order, prior)
    assert order.tolist() == [0, 0, 2, 0, 4]
    assert np.allclose(prior, 1 / 3)
    share(np.array([[1e-8, 0], [-1e-8, 0], [0, -0.0], [0, 0], [1e-8, 1e-8]], np.float32), order, prior)
    assert order.tolist() == [0, 1, 2, 0, 0]


# ---- what else is promised -----------------------------------------------------------------------------------------


def one_search(seed: int = 0, tree: Any = None, chunks: Sequence[int] = (), sampled: bool = False) -> Tree:
    """The tree that a search of seven rows leaves."""
    rng = np.random.default_rng(0)
    if sampled:
        case = sampled_case(rng, continuous=True, rows=7)._replace(simulations=9)
        answers: Any = SampledAnswers(rng, case)
    else:
        legal = [[1, 3], [], [2], [3, 0, 1], [0], [], [1, 2]]
        case = plain_case(7, [0.3, 0, 0.1, -0.5], 9, weight=0.25)._replace(legal=legal)
        answers = RandomAnswers(rng, 7, 4, False)
    ours = Ours(case, seed, tree, chunks)
    for simulation in range(case.simulations):
        ours.backpropagate(simulation, *answers(simulation, *ours.traverse(simulation)))
    return ours.tree


def same(one: Tree, other: Tree) -> bool:
    """Whether two searches left the same, but for what they did not come to read."""
    unread = 'scores', 'path', 'prior'
    return all(np.array_equal(*arrays) for name, *arrays in zip(Tree._fields, one, other) if name not in unread)


@pytest.mark.parametrize('sampled', [False, True], ids=['all actions', 'sampled actions'])
def test_a_search_goes_by_its_seed_alone(sampled: bool) -> None:
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = one_search(sampled=sampled)
    assert same(first, one_search(sampled=sampled))
    assert not same(first, one_search(seed=1, sampled=sampled))
    assert same(first, one_search(chunks=[2, 3], sampled=sampled))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1]) and torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize('sampled', [False, True], ids=['all actions', 'sampled actions'])
def test_a_tree_is_used_again(sampled: bool) -> None:
    used = one_search(seed=1, sampled=sampled)
    fresh = one_search(sampled=sampled)
    assert same(one_search(tree=used, sampled=sampled), fresh)


def test_searches_of_one_seed_differ() -> None:
    words = {draw(make_key(5, search), 0, 0, 0, 0) for search in range(100)}
    assert len(words) == 100


def test_no_number_is_action_0_legal_or_not() -> None:
    case = plain_case(2, [np.nan] * 3, 3)._replace(legal=[[1, 2], []])
    for search in (Reference(case), Ours(case)):
        for simulation in range(3):
            parents, actions = search.traverse(simulation)
            assert parents.tolist() == [simulation] * 2 and actions.tolist() == [0, 0]
            search.backpropagate(simulation, *np.zeros((2, 2), np.float32), np.full((2, 3), np.nan, np.float32))
        assert search.visits() == [[0, 0], [3, 0, 0]]


def test_one_legal_action_has_every_visit() -> None:
    case = plain_case(3, [0, 1, 2], 5, legal=[2], weight=0.25)
    assert Ours(case).visits() == [[0]] * 3
    assert means_of(case, Ours)[:, 0].tolist() == means_of(case, Reference)[:, 0].tolist() == [5, 5, 5]


def test_contexts_follow_from_those_of_the_parents() -> None:
    rng = np.random.default_rng(0)
    rows, simulations, width = 4, 12, 3
    tree = make_tree(rows, simulations, 2, width)
    tables, counts = np.zeros((simulations + 1, rows, width), int), np.zeros((simulations + 1, rows), int)
    counts[0] = np.arange(rows)
    tables[0] = np.where(np.arange(width) < counts[0][:, None], 50 + np.arange(width), 0)
    tree.tables[:, 0], tree.counts[:, 0] = tables[0], counts[0]
    tree.depth[:] = 1
    for simulation in range(simulations):
        pages, parents = rng.integers(100, 1000, rows), rng.integers(0, simulation + 1, rows)
        tree.path[:, 0] = parents
        extend_rows(tree, pages, simulation, 0, 2)
        extend_rows(tree, pages, simulation, 2, rows)
        above = tables[parents, np.arange(rows)], counts[parents, np.arange(rows)]
        tables[simulation + 1], counts[simulation + 1] = extend(above, pages)
    assert np.array_equal(tree.tables.swapaxes(0, 1), tables) and np.array_equal(tree.counts.T, counts)
