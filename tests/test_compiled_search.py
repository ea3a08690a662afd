"""A whole search as one compiled call, against the same trees with the model's own step by node."""
import threading
from functools import partial
from typing import Any, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
import pytest
import torch
from oracle import Case, cached_model

from lzero_kvcache.engine.compiled import new_scratch
from lzero_kvcache.engine.compiling import entry
from lzero_kvcache.engine.program import read_network
from lzero_kvcache.search import tree as trees
from lzero_kvcache.search.compiled import Batch, Roots, make_batch, search_rows
from lzero_kvcache.search.tree import Rules, Tree, make_key, make_rules, make_tree, pad_legal, root_values, root_visits

prepare_rows, select_rows, backup_rows = map(entry, (trees.prepare_rows, trees.select_rows, trees.backup_rows))

KEY = make_key(1, 2)
ROWS, SIMULATIONS = 19, 12
LEGAL = [[], [2, 0], [1]]
SAMPLED = dict(two_players=False, sampled=True)

CASES = pytest.mark.parametrize('case, rules', [
    (Case(rotary=True), make_rules(19652, 1.25, 0.997, 0.01, False)),
    (Case(context_length=6, num_layers=1, num_heads=4), make_rules(19652, 1.25, 0.997, 0.01, True)),
    (Case(rotary=True, continuous=True), make_rules(19652, 1.25, 0.997, 0.01, continuous=True, **SAMPLED)),
    (Case(sampled=True), make_rules(19652, 1.25, 0.997, 0.01, **SAMPLED)),
], ids=['rotary', 'learned, two players', 'continuous', 'sampled discrete'])


class Root(NamedTuple):
    """Roots of a search, and whom they belong to."""
    inference: Any
    roots: Roots


@pytest.fixture
def root(case: Case, rules: Rules) -> Iterator[Root]:
    """Roots whose contexts slide; every third environment has just begun its episode."""
    model = cached_model(case, ROWS, 5)
    world_model, rng = model.world_model, np.random.default_rng(0)
    obs = torch.from_numpy(rng.normal(size=(6, ROWS, *case.obs_shape)).astype(np.float32))
    for step in range(1, 6):
        actions: List[Any] = list(rng.integers(0, case.action_space_size, ROWS))
        if case.continuous:
            actions = list(rng.uniform(-1, 1, (ROWS, case.action_space_size)).astype(np.float32))
        timesteps = np.full(ROWS, step)
        if step == 5:
            timesteps[::3] = 0
        actions = [action if timestep else -1 for action, timestep in zip(actions, timesteps)]
        with world_model.serving('collect', range(ROWS)), torch.no_grad():
            output = model.initial_inference(obs[step - 1], actions, obs[step], list(timesteps))
            if step == 5:
                (tables, counts), timesteps = world_model.inference._roots
                slots = 4 if case.continuous else case.action_space_size
                legal = pad_legal([[] if rules.sampled else LEGAL[row % 3] for row in range(ROWS)], slots)
                noise = rng.dirichlet([0.3] * slots, ROWS).astype(np.float32)
                yield Root(world_model.inference, Roots(
                    np.zeros(ROWS, np.float32), output.policy_logits.numpy(), legal, noise, np.float32(0.25), tables,
                    counts, timesteps
                ))


def new_tree(case: Case, rules: Rules, roots: Roots) -> Tree:
    size = (case.action_space_size if case.continuous else 1) if rules.sampled else 0
    return make_tree(ROWS, SIMULATIONS, roots.legal.shape[1], roots.tables.shape[1], size)


def search_compiled(case: Case, rules: Rules, root: Root, bounds: Sequence[int] = (0, ROWS)) -> Tuple[Tree, Batch]:
    """A thread for all rows between two bounds."""
    inference, roots = root
    tree = new_tree(case, rules, roots)
    network, kept = read_network(inference._wm)
    pages = inference._manager.open_search((roots.tables, roots.counts), SIMULATIONS).pages
    shift = inference._weights().shift
    if shift is None:
        shift = torch.zeros(1, case.num_layers, 2, case.embed_dim)
    batch = make_batch(tree, roots.logits.shape[1])
    given = tree, rules, KEY, roots, network, shift.numpy(), inference._slab().data.numpy(), pages, batch
    threads = [
        threading.Thread(target=search_rows, args=(*given, new_scratch(network, roots.tables.shape[1]), lo, hi))
        for lo, hi in zip(bounds[:-1], bounds[1:])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tree, batch


def search_by_steps(case: Case, rules: Rules, root: Root) -> Tree:
    """The same search with the engine's step in torch."""
    inference, roots = root
    tree, rows = new_tree(case, rules, roots), np.arange(ROWS)
    prepare_rows(tree, rules, KEY, *roots[:5], 0, ROWS)
    nodes = inference._manager.open_search((roots.tables, roots.counts), SIMULATIONS)
    expand = partial(inference.expand, nodes, roots.timesteps)
    for simulation in range(SIMULATIONS):
        select_rows(tree, rules, KEY, simulation, 0, ROWS)
        parents, actions = tree.path[rows, tree.depth - 1], tree.action
        if rules.sampled:
            actions = tree.draws[rows, parents, tree.action]
            actions = actions if case.continuous else actions.astype(np.int64)
        predicted = expand(simulation, parents, rows, actions, parents if rules.sampled else tree.depth)
        reward, value, policy = (np.ascontiguousarray(part) for part in np.split(predicted, [1, 2], axis=1))
        backup_rows(tree, rules, KEY, simulation, reward[:, 0], value[:, 0], policy, 0, ROWS)
    return tree


@CASES
def test_a_compiled_search_is_the_search_by_steps(case: Case, rules: Rules, root: Root) -> None:
    one, batch = search_compiled(case, rules, root)
    other = search_by_steps(case, rules, root)
    assert root_visits(one) == root_visits(other)
    np.testing.assert_array_equal(one.child, other.child)
    np.testing.assert_allclose(one.reward, other.reward, atol=3e-4)  # what float32 makes of the step in torch
    np.testing.assert_allclose(root_values(one), root_values(other), atol=3e-4)
    assert np.std(one.reward) > 0.01 and not batch.broken.any()


@CASES
def test_threads_share_the_rows_of_a_search(case: Case, rules: Rules, root: Root) -> None:
    one, _ = search_compiled(case, rules, root)
    other, _ = search_compiled(case, rules, root, [0, 3, 11, ROWS])
    assert root_visits(one) == root_visits(other) and root_values(one) == root_values(other)


@CASES
def test_what_is_no_number_is_counted_and_searched_as_zero(case: Case, rules: Rules, root: Root) -> None:
    with torch.no_grad():
        linear = [part for part in root.inference._wm.head_value.modules() if isinstance(part, torch.nn.Linear)][-1]
        linear.bias.fill_(float('nan'))
    tree, batch = search_compiled(case, rules, root)
    assert batch.broken.tolist() == [SIMULATIONS] * ROWS
    assert np.isfinite(root_values(tree)).all() and not batch.value.any()
    assert [sum(visits) for visits in root_visits(tree)] == [SIMULATIONS] * ROWS
