"""LightZero's tree search on trees in arrays, compiled by numba. Knows page ids; no model, no pools.

Shapes are those of :mod:`.tree_arrays`. Everything is float32, in the order of operations of LightZero's C++, so that
scores are equal to the last bit.
"""
import math
from typing import Any, List

import numpy as np

from ..engine.compiling import ZERO, inlined, inner
from .random_numbers import PhiloxKey, below, draw, normal, uniform
from .tree_arrays import ACTION, DECIMALS, FAR, FLOATS, MOST_DRAWN, NEAR, TIE, Rules, Tree, tree_shapes

_ZERO, _ONE = np.float32(0), np.float32(1)
_FAR, _NEAR, _MOST_DRAWN = np.float32(FAR), np.float32(NEAR), np.float32(MOST_DRAWN)


def make_key(seed: int, search: int) -> PhiloxKey:
    """The key of a search's draws."""
    return np.uint32(seed & 0xFFFFFFFF), np.uint32(search & 0xFFFFFFFF)


def make_tree(rows: int, simulations: int, slots: int, context_pages: int, action_size: int = 0) -> Tree:
    """Arrays for searches of one size."""
    shapes = tree_shapes(rows, simulations, slots, context_pages, action_size)
    tree = Tree(scores=np.zeros((rows, slots), np.float32), **{
        name: np.zeros(shape, np.float32 if name in FLOATS else np.int32) for name, shape in shapes.items()
    })
    tree.child.fill(-1)
    tree.order.fill(-1)
    return tree


@inlined
def filled(tree: Tree, row: int, node: int) -> int:
    """The length of a node's ``order``."""
    count = tree.order.shape[2]
    while count > 0 and tree.order[row, node, count - 1] < 0:
        count -= 1
    return count


# ---- selection -----------------------------------------------------------------------------------------------------


@inlined
def quality(tree: Tree, rules: Rules, row: int, node: int, sign: np.float32) -> np.float32:
    """Q of the step to a visited node; ``sign`` is -1 for the other player's view of its value."""
    value = tree.value_sum[row, node] / np.float32(tree.visits[row, node])
    return tree.reward[row, node] + rules.discount * (sign * value)


@inlined
def mean_quality(tree: Tree, rules: Rules, row: int, node: int, above: np.float32) -> np.float32:
    """The mean Q of a node's visited children; below the root, its parent's mean (``above``) counts as one more."""
    total, seen = _ZERO, 0
    for index in range(filled(tree, row, node)):
        child = tree.child[row, node, tree.order[row, node, index]]
        if child >= 0:
            total += quality(tree, rules, row, child, _ONE)
            seen += 1
    if node == 0 and seen > 0:
        return total / np.float32(seen)
    return (above + total) / np.float32(seen + 1)


@inlined
def normalise(value: np.float32, low: np.float32, high: np.float32, least: np.float32) -> np.float32:
    """A value's place in a range, from 0 to 1; nan stays nan."""
    width = high - low
    if width > _ZERO:
        value = (value - low) / (least if width < least else width)
    if value < _ZERO:
        value = _ZERO
    return _ONE if value > _ONE else value


@inlined
def exploration(rules: Rules, others: np.float32) -> np.float32:
    """The weight of priors after ``others`` visits of a node's children."""
    return np.float32(math.log((others + rules.base + _ONE) / rules.base)) + rules.init


@inlined
def score_children(tree: Tree, rules: Rules, row: int, node: int, mean: np.float32) -> int:
    """Write the upper confidence bounds of a node's children to ``scores``, in its ``order``; returns how many."""
    sign = -_ONE if rules.two_players else _ONE
    others = np.float32(tree.visits[row, node] - 1)
    explored = exploration(rules, others)
    spread = np.float32(math.sqrt(others))
    count = filled(tree, row, node)
    for index in range(count):
        slot = tree.order[row, node, index]
        child = tree.child[row, node, slot]
        taken, value = _ZERO, mean
        if child >= 0:
            taken, value = np.float32(tree.visits[row, child]), quality(tree, rules, row, child, sign)
        value = normalise(value, tree.low[row], tree.high[row], rules.delta)
        tree.scores[row, index] = explored * (spread / (taken + _ONE)) * tree.prior[row, node, slot] + value
    return count


@inlined
def pick_best(tree: Tree, rules: Rules, count: int, key: PhiloxKey, row: int, simulation: int, depth: int) -> int:
    """The index of the first best score; or, if ties are drawn, of one drawn among it and the later ones within 1e-6.
    -1 if no score is a number."""
    first, best = -1, -_FAR
    for index in range(count):
        if best < tree.scores[row, index]:
            first, best = index, tree.scores[row, index]
    if first < 0 or not rules.draws_ties:
        return first
    ties = 0
    for index in range(first, count):
        if tree.scores[row, index] >= best - _NEAR:
            ties += 1
    left = below(draw(key, row, simulation, depth, TIE)[0], ties) if ties > 1 else 0
    for index in range(first, count):
        if tree.scores[row, index] >= best - _NEAR:
            if left == 0:
                return index
            left -= 1
    return first


@inlined
def select(tree: Tree, rules: Rules, key: PhiloxKey, simulation: int, row: int) -> None:
    """Walk from the root to where a simulation adds its node; writes path, depth and action, and links the node."""
    node, depth, above = 0, 0, _ZERO
    while node <= simulation:
        tree.path[row, depth] = node
        above = mean_quality(tree, rules, row, node, above)
        count = score_children(tree, rules, row, node, above)
        index = pick_best(tree, rules, count, key, row, simulation, depth)
        slot = tree.order[row, node, index] if index >= 0 else 0
        tree.action[row] = max(index, 0) if rules.sampled else slot
        child = tree.child[row, node, slot]
        if child < 0:
            child = simulation + 1
            tree.child[row, node, slot] = child
        node, depth = child, depth + 1
    tree.path[row, depth], tree.depth[row] = node, depth


@inner
def select_rows(tree: Tree, rules: Rules, key: PhiloxKey, simulation: int, lo: int, hi: int) -> None:
    """:func:`select` for rows ``lo`` to ``hi``."""
    for row in range(lo, hi):
        select(tree, rules, key, simulation, row)


@inlined
def parent(tree: Tree, row: int) -> int:
    """The node to which the selected path adds a child."""
    return tree.path[row, tree.depth[row] - 1]


# ---- expansion -----------------------------------------------------------------------------------------------------


@inlined
def softmax(tree: Tree, row: int, node: int, logits: np.ndarray) -> None:
    """Write the priors of the slots in a node's ``order``, from logits ``[B, P]``."""
    count = filled(tree, row, node)
    largest, total = -_FAR, _ZERO
    for index in range(count):
        logit = logits[row, tree.order[row, node, index]]
        if largest < logit:
            largest = logit
    for index in range(count):
        slot = tree.order[row, node, index]
        tree.prior[row, node, slot] = math.exp(logits[row, slot] - largest)
        total += tree.prior[row, node, slot]
    for index in range(count):
        tree.prior[row, node, tree.order[row, node, index]] /= total


@inner
def draw_continuous(key: PhiloxKey, row: int, node: int, logits: np.ndarray, draws: np.ndarray) -> None:
    """Draw actions ``[S, A]``: tanh of normal draws, by means and then deviations in ``logits``."""
    count, size = draws.shape
    for index in range(count):
        for part in range(size):
            drawn = np.float32(normal(draw(key, row, node, index * size + part, ACTION)))
            drawn = drawn * logits[size + part] + logits[part]
            drawn = _MOST_DRAWN if _MOST_DRAWN < drawn else drawn
            draws[index, part] = math.tanh(drawn if -_MOST_DRAWN < drawn else -_MOST_DRAWN)


@inner
def draw_discrete(key: PhiloxKey, row: int, node: int, logits: np.ndarray, draws: np.ndarray) -> None:
    """Draw actions ``[S, 1]`` without replacement: those with the largest u ** (1 / p), the first of equal ones."""
    total = _ZERO
    for logit in logits:
        total += np.float32(math.exp(logit))
    rank = np.empty(len(logits), np.float64)
    for action, logit in enumerate(logits):
        probability = np.float32(np.float32(math.exp(logit)) / (np.float64(total) + NEAR))
        rank[action] = uniform(draw(key, row, node, action, ACTION)) ** (1.0 / np.float64(probability))
    for index in range(len(draws)):
        best = 0
        for action in range(len(logits)):
            if rank[action] > rank[best]:
                best = action
        draws[index, 0] = best
        rank[best] = -1.0


@inner
def same_action(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether C prints two actions with the same six decimals; -0.0 is not 0.0."""
    for part in range(len(one)):
        a, b = np.rint(np.float64(one[part]) * DECIMALS), np.rint(np.float64(other[part]) * DECIMALS)
        if a != b or math.copysign(1.0, a) != math.copysign(1.0, b):
            return False
    return True


@inner
def share(draws: np.ndarray, order: np.ndarray, prior: np.ndarray) -> None:
    """Give equal draws ``[S, A]`` one slot, and all slots the same prior."""
    children = 0
    for index in range(len(draws)):
        order[index] = index
        for before in range(index):
            if same_action(draws[before], draws[index]):
                order[index] = before
                break
        if order[index] == index:
            children += 1
    prior[:] = _ONE / np.float32(children)


@inlined
def expand(tree: Tree, rules: Rules, key: PhiloxKey, row: int, node: int, reward: np.float32,
           logits: np.ndarray) -> None:
    """Initialise a node from its predictions. An ``order`` that is empty is filled with every slot."""
    tree.visits[row, node], tree.value_sum[row, node], tree.reward[row, node] = 0, _ZERO, reward
    for slot in range(tree.child.shape[2]):
        tree.child[row, node, slot] = -1
    if rules.sampled:
        draws = tree.draws[row, node]
        if rules.continuous:
            draw_continuous(key, row, node, logits[row], draws)
        else:
            draw_discrete(key, row, node, logits[row], draws)
        share(draws, tree.order[row, node], tree.prior[row, node])
        return
    if tree.order[row, node, 0] < 0:
        for slot in range(tree.order.shape[2]):
            tree.order[row, node, slot] = slot
    softmax(tree, row, node, logits)


@inner
def prepare_rows(tree: Tree, rules: Rules, key: PhiloxKey, rewards: np.ndarray, logits: np.ndarray, legal: np.ndarray,
                 noise: np.ndarray, weight: np.float32, lo: int, hi: int) -> None:
    """Initialise the roots of rows ``lo`` to ``hi``: by rewards ``[B]``, logits ``[B, P]``, legal actions ``[B, S]``
    followed by -1 (all -1: every action is legal), noise ``[B, S]`` in the order of legal actions, and its weight."""
    for row in range(lo, hi):
        tree.order[row, 0] = legal[row]
        expand(tree, rules, key, row, ZERO, rewards[row], logits)
        if not rules.sampled:  # sampled trees ignore noise
            for index in range(filled(tree, row, ZERO)):
                slot = tree.order[row, 0, index]
                tree.prior[row, 0, slot] = tree.prior[row, 0, slot] * (_ONE - weight) + noise[row, index] * weight
        tree.visits[row, 0], tree.low[row], tree.high[row] = 1, _FAR, -_FAR


@inner
def extend_rows(tree: Tree, pages: np.ndarray, simulation: int, lo: int, hi: int) -> None:
    """Write the contexts of new nodes: the parent's and page ``pages[row]``; a full one drops its first page."""
    context_pages = tree.tables.shape[2]
    for row in range(lo, hi):
        node, new = parent(tree, row), simulation + 1
        dropped = 1 if tree.counts[row, node] == context_pages else 0
        kept = tree.counts[row, node] - dropped
        for index in range(kept):
            tree.tables[row, new, index] = tree.tables[row, node, index + dropped]
        tree.tables[row, new, kept] = pages[row]
        for index in range(kept + 1, context_pages):
            tree.tables[row, new, index] = 0
        tree.counts[row, new] = kept + 1


# ---- backup --------------------------------------------------------------------------------------------------------


@inlined
def backup(tree: Tree, rules: Rules, row: int, value: np.float32) -> None:
    """Add a value to every node of the selected path, from the new one up to the root."""
    last = tree.depth[row]
    sign = -_ONE if rules.two_players and not rules.sampled else _ONE
    for depth in range(last, -1, -1):
        node = tree.path[row, depth]
        own = rules.two_players and (last - depth) % 2 == 0  # the turn of who moves at the new node
        tree.value_sum[row, node] += value if own or not rules.two_players else -value
        tree.visits[row, node] += 1
        reward, reached = tree.reward[row, node], quality(tree, rules, row, node, sign)
        if reached > tree.high[row]:
            tree.high[row] = reached
        if reached < tree.low[row]:
            tree.low[row] = reached
        value = (-reward if own else reward) + rules.discount * value


@inner
def backup_rows(tree: Tree, rules: Rules, key: PhiloxKey, simulation: int, rewards: np.ndarray, values: np.ndarray,
                logits: np.ndarray, lo: int, hi: int) -> None:
    """Expand the new nodes of rows ``lo`` to ``hi`` by predictions ``[B]``, ``[B]`` and ``[B, P]``, and back up their
    values."""
    for row in range(lo, hi):
        expand(tree, rules, key, row, simulation + 1, rewards[row], logits)
        backup(tree, rules, row, values[row])


# ---- what a search leaves ------------------------------------------------------------------------------------------


def root_visits(tree: Tree) -> List[List[int]]:
    """How often each of a root's legal or drawn actions was taken, in their order."""
    order = tree.order[:, 0]
    children = np.take_along_axis(tree.child[:, 0], np.maximum(order, 0), axis=1)
    visits = np.where(children < 0, 0, np.take_along_axis(tree.visits, np.maximum(children, 0), axis=1))
    return [row[:count].tolist() for row, count in zip(visits, (order >= 0).sum(axis=1))]


def root_values(tree: Tree) -> List[float]:
    """The mean value of each root."""
    return (tree.value_sum[:, 0] / tree.visits[:, 0].astype(np.float32)).tolist()


def root_actions(tree: Tree) -> List[Any]:
    """The actions drawn at each root, ``[B][K][A]``."""
    return tree.draws[:, 0].tolist()
