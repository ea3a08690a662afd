"""A search in arrays as one compiled call, against the same trees with the model's own step by node."""
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterator, List, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from forks import in_forks
from recorded_choices import make_rules
from small_models import Case, cached_model

from lzero_kvcache.engine.compiling import entry
from lzero_kvcache.engine.team import FINISHED
from lzero_kvcache.search import compiled_model, compiled_search, cpu_search, tree
from lzero_kvcache.search.array_search import Problem
from lzero_kvcache.search.cpu_search import CpuSearch
from lzero_kvcache.search.tree import Tree, make_key, make_tree, root_values, root_visits

# Compiled once for a machine, as the search is.
prepare_rows, select_rows, backup_rows = map(entry, (tree.prepare_rows, tree.select_rows, tree.backup_rows))

ROWS, SIMULATIONS = 25, 12
LEGAL = [[], [2, 0], [1]]

CASES = pytest.mark.parametrize('case, rules', [
    (Case(rotary=True), {}),
    (Case(context_length=6, num_layers=1, num_heads=4), dict(two_players=True)),
    (Case(rotary=True, continuous=True), dict(sampled=True, continuous=True)),
    (Case(rotary=True, sampled=True), dict(sampled=True, index_for_depth=True)),
    (Case(sampled=True), dict(sampled=True)),
], ids=['rotary', 'learned, two players', 'continuous', 'by index', 'sampled discrete'])


class Root(NamedTuple):
    """A model whose roots were just inferred, and what is to be searched from there."""
    world_model: Any
    problem: Problem


@pytest.fixture
def root(case: Case, rules: Dict[str, bool]) -> Iterator[Root]:
    yield from roots_of(cached_model(case, ROWS, 5, kv_cache_cfg=dict(on_nan='skip')), case, rules)


def roots_of(model: Any, case: Case, rules: Dict[str, bool]) -> Iterator[Root]:
    """Roots whose contexts slide; every third environment has just begun its episode."""
    world_model, rng = model.world_model, np.random.default_rng(0)
    obs = torch.from_numpy(rng.normal(size=(6, ROWS, *case.obs_shape)).astype(np.float32))
    obs = obs.to(world_model.weights_source.device())
    for step in range(1, 6):
        actions: List[Any] = list(rng.integers(0, case.action_space_size, ROWS))
        if case.continuous:
            actions = list(rng.uniform(-1, 1, (ROWS, case.action_space_size)).astype(np.float32))
        timesteps = np.full(ROWS, step)
        if step == 5:
            timesteps[::3] = 0
        actions = [action if timestep else -1 for action, timestep in zip(actions, timesteps)]
        with world_model.open_step('collect', range(ROWS)), torch.no_grad():
            output = model.initial_inference(obs[step - 1], actions, obs[step], list(timesteps))
            if step == 5:
                yield Root(world_model, problem_of(case, rules, output.policy_logits.tolist()))


def problem_of(case: Case, rules: Dict[str, bool], logits: List[List[float]]) -> Problem:
    sampled, slots = 'sampled' in rules, 4 if case.continuous else case.action_space_size
    legal: List[List[int]] = [[] if sampled else LEGAL[row % 3] for row in range(ROWS)]
    noises = [np.random.dirichlet([0.3] * (len(actions) or slots)).tolist() for actions in legal]
    action_size = case.action_space_size if case.continuous else 1
    return Problem(
        make_rules(**rules), 1, 2, SIMULATIONS, slots, action_size if sampled else 0, [0.] * ROWS, logits, legal,
        noises, 0.25
    )


def search_by_steps(root: Root) -> Tree:
    """The same search with the engine's step in torch."""
    problem, rows = root.problem, np.arange(ROWS)
    rules, key = problem.rules, make_key(problem.seed, problem.number)
    tree = make_tree(ROWS, SIMULATIONS, problem.slots, 1, problem.action_size)
    prepare_rows(
        tree, rules, key, np.zeros(ROWS, np.float32), np.float32(problem.logits),
        problem.padded_legal(), problem.padded_noises(), np.float32(problem.noise_weight), 0, ROWS
    )
    inference = root.world_model.inference
    with inference.search_by_node(inference.open.steps[-1], SIMULATIONS) as expand:
        for simulation in range(SIMULATIONS):
            select_rows(tree, rules, key, simulation, 0, ROWS)
            parents, actions = tree.path[rows, tree.depth - 1], tree.action
            if rules.sampled:
                actions = tree.draws[rows, parents, tree.action]
                actions = actions if rules.continuous else actions.astype(np.int64)
            predicted = expand(simulation, parents, rows, actions, parents if rules.index_for_depth else tree.depth)
            reward, value, policy = (np.ascontiguousarray(part) for part in np.split(predicted, [1, 2], axis=1))
            backup_rows(tree, rules, key, simulation, reward[:, 0], value[:, 0], policy, 0, ROWS)
    return tree


def found(root: Root, **changes: Any) -> List[Any]:
    """What a compiled search leaves."""
    inference = root.world_model.inference
    return left(trees_of(inference._cpu_search, inference.open.steps[-1], root.problem._replace(**changes)))


@torch.no_grad()
def trees_of(search: CpuSearch, step: Any, problem: Problem) -> Tree:
    """The trees of a search, which the next one writes over."""
    with mock.patch.object(cpu_search, '_found', lambda tree, rules: tree):
        return search.search(step, problem)  # type: ignore[return-value]


def left(tree: Tree) -> List[Any]:
    """What a search left, as lists."""
    return [root_visits(tree), root_values(tree), tree.child.tolist(), tree.reward.tolist()]


@CASES
def test_a_compiled_search_is_the_search_by_steps(root: Root) -> None:
    visits, values, child, reward = found(root)
    other = search_by_steps(root)
    assert visits == root_visits(other)
    assert child == other.child.tolist()
    np.testing.assert_allclose(reward, other.reward, atol=3e-4)  # what float32 makes of the step in torch
    np.testing.assert_allclose(values, root_values(other), atol=3e-4)
    assert np.std(reward) > 0.01
    assert root.world_model.kv_cache_manager.counters()['skipped'] == 0


@CASES
def test_threads_share_the_rows_of_a_search(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, shares = found(root), []
    search_rows = compiled_search.search_rows

    def noted(*args: Any) -> None:
        if args[-1] > 0:  # else it is only compiled
            shares.append((threading.current_thread(), *args[-2:]))
        search_rows(*args)

    monkeypatch.setattr(compiled_search, 'search_rows', noted)
    torch.set_num_threads(3)
    assert found(root) == alone
    torch.set_num_threads(1)
    assert sorted(bounds for _, *bounds in shares) == [[0, 8], [8, 16], [16, 25]]
    assert len({thread for thread, *_ in shares}) == 3


@CASES
def test_threads_share_the_products_of_a_wide_model(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, helped = found(root), []
    help_search = compiled_search.help_search

    def noted(team: np.ndarray, worker: int) -> None:
        help_search(team, worker)
        if threading.current_thread() is not threading.main_thread():  # which only has it compiled
            helped.append((threading.current_thread(), worker, int(team[FINISHED])))

    monkeypatch.setattr(compiled_search, 'help_search', noted)
    monkeypatch.setattr(compiled_model, 'WIDTH', ROWS)
    torch.set_num_threads(3)
    assert found(root) == alone and helped == []
    monkeypatch.setattr(compiled_model, 'LEAST_COLUMNS', 10)
    assert found(root) == alone
    torch.set_num_threads(1)
    assert sorted(worker for _, worker, _ in helped) == [1, 2] and len({thread for thread, *_ in helped}) == 2
    assert all(finished % 3 == 0 and finished > 3 * SIMULATIONS for *_, finished in helped)


class Broken(Exception):
    pass


@pytest.mark.parametrize('case, rules', [(Case(), {})])
def test_who_helps_out_leaves_a_search_that_fails(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise Broken

    before = found(root)
    monkeypatch.setattr(compiled_model, 'WIDTH', ROWS)
    monkeypatch.setattr(compiled_model, 'LEAST_COLUMNS', 10)
    torch.set_num_threads(2)
    with monkeypatch.context() as meanwhile, pytest.raises(Broken):
        meanwhile.setattr(compiled_search, 'search_rows', broken)
        found(root)
    assert threading.active_count() == 1
    assert found(root) == before
    torch.set_num_threads(1)


@CASES
def test_two_threads_search_one_model(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is in the middle of its search when the other goes on."""
    alone = [found(root, number=number) for number in (3, 4)]
    [step], search = root.world_model.inference.open.steps, root.world_model.inference._cpu_search
    search_rows, middle, begun = compiled_search.search_rows, threading.Barrier(2, timeout=60), threading.Event()

    def in_halves(*args: Any) -> None:
        if args[-1] == 0:  # it is only compiled
            return
        search_rows(*args[:-4], 0, SIMULATIONS // 2, *args[-2:])
        begun.set()
        middle.wait()
        search_rows(*args[:-4], SIMULATIONS // 2, SIMULATIONS, *args[-2:])

    def run(number: int) -> List[Any]:
        return left(search.search(step, root.problem._replace(number=number)))

    monkeypatch.setattr(compiled_search, 'search_rows', in_halves)
    monkeypatch.setattr(cpu_search, '_found', lambda tree, rules: tree)
    monkeypatch.setattr(root.world_model.inference.open, 'check_searchable', lambda step: step)  # of this thread alone
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(run, 3)
        assert begun.wait(60)
        second = threads.submit(run, 4)
        assert [first.result(60), second.result(60)] == alone
    monkeypatch.undo()
    assert [found(root, number=number) for number in (3, 4)] == alone


@CASES
def test_a_fork_searches_as_its_parent_does(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a search of the parent with several threads, which a fork does not have. torch's own number stays 1: its
    products of several threads wait for ever in a fork of a process that has computed any."""
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 3)
    before = found(root)
    assert in_forks({name: lambda: found(root) for name in ('one', 'other')}) == dict(one=before, other=before)
    assert found(root) == before


@CASES
def test_arrays_are_used_again(root: Root) -> None:
    first = found(root)
    other = found(root, number=3, noise_weight=0.)
    assert other[1] != first[1]
    assert found(root) == first


@CASES
def test_what_is_no_number_is_counted_and_searched_as_zero(root: Root) -> None:
    head = root.world_model.head_value
    linear = [part for part in head.modules() if isinstance(part, torch.nn.Linear)][-1]
    with torch.no_grad():
        linear.bias.fill_(float('nan'))
    broken = found(root)
    assert root.world_model.kv_cache_manager.counters()['skipped'] == SIMULATIONS * ROWS
    assert np.isfinite(broken[1]).all() and all(sum(visits) == SIMULATIONS for visits in broken[0])
    with torch.no_grad():  # a value of exactly zero
        linear.weight.zero_()
        linear.bias.zero_()
    assert found(root) == broken
