"""A search on a GPU by Triton's interpreter, against the compiled search on the CPU."""
import contextlib
import gc
import importlib.util
import sys
import types
from dataclasses import replace
from typing import Any, Dict, List, Tuple
from unittest import mock

import numpy as np
import pytest
import test_compiled_search as compiled
import test_reanalysis as reanalysis
import torch
from recorded_choices import make_rules
from small_models import Case, altered, cached_model
from test_compiled_search import Root, problem_of, root  # noqa: F401  (a fixture)

from lzero_kvcache.config import MIB
from lzero_kvcache.engine.compiling import entry
from lzero_kvcache.engine.slab import Slab
from lzero_kvcache.host.tree_search import KeylessSearch, Roots
from lzero_kvcache.search import cpu_search, gpu_search
from lzero_kvcache.search.array_search import Found
from lzero_kvcache.search.gpu_memory import GpuMemory, GrownReanalysis, Reanalysis, explorations
from lzero_kvcache.search.gpu_search import ROWS_APART
from lzero_kvcache.search.open_steps import StepsOfThread
from lzero_kvcache.search.timesteps import reanalysis_timesteps_of
from lzero_kvcache.search.tree import exploration, root_actions, root_values, root_visits
from lzero_kvcache.validation.trace import Trace

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason='where there is a GPU, kernels are compiled')
needs_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs triton')
pytestmark = needs_triton

SEARCHES: Dict[str, Tuple[Case, Dict[str, bool]]] = {
    'rotary': (Case(rotary=True), {}),
    'learned, two players': (Case(context_length=6, num_layers=1, num_heads=4), dict(two_players=True)),
    'learned': (Case(), {}),
    'continuous': (Case(rotary=True, continuous=True), dict(sampled=True, continuous=True)),
    'sampled discrete': (Case(sampled=True), dict(sampled=True)),
    'by index': (Case(rotary=True, sampled=True), dict(sampled=True, index_for_depth=True)),
}


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond for each operation on a row."""
    monkeypatch.setattr(compiled, 'ROWS', 2)
    monkeypatch.setattr(compiled, 'SIMULATIONS', 4)
    monkeypatch.setattr(gpu_search, 'ROWS_APART', 1)
    for name, number in dict(SAMPLES=1, ROWS=4, SIMULATIONS=2).items():
        monkeypatch.setattr(reanalysis, name, number)


@interpreted
@pytest.mark.parametrize('case, rules', [
    (case if name == 'learned' else replace(case, num_layers=1), rules) for name, (case, rules) in SEARCHES.items()
], ids=list(SEARCHES))
def test_interpreted_it_is_the_compiled_search(_small: None, root: Root) -> None:  # noqa: F811
    [step] = root.world_model.inference.open.steps
    step.trace = noted = Trace('collect', step.env_ids, 1, replayed=True)
    visits, values, actions = root.world_model.inference._gpu_search.search(step, root.problem)
    [memory] = root.world_model.inference._gpu_search._memories.kept.values()
    step.trace = Trace('collect', step.env_ids, 1, replayed=True)
    tree = compiled.trees_of(root.world_model.inference._cpu_search, step, root.problem)
    assert visits == root_visits(tree)
    np.testing.assert_allclose(values, root_values(tree), atol=3e-4)  # what float32 makes of the model's steps
    ordered = slice(None) if root.problem.rules.sampled else 0  # nodes that have all actions need no order
    assert memory.tree.child.tolist() == tree.child.tolist()
    assert memory.tree.order[:, ordered].tolist() == tree.order[:, ordered].tolist()
    np.testing.assert_allclose(memory.tree.reward, tree.reward, atol=3e-4)
    np.testing.assert_allclose(memory.tree.draws, tree.draws, atol=1e-5)
    assert (actions is not None) == root.problem.rules.sampled
    if actions is not None:
        np.testing.assert_allclose(actions, root_actions(tree), atol=1e-6)
    assert len(noted.nodes) == compiled.SIMULATIONS
    for node, other in zip(noted.nodes, step.trace.nodes):
        for part, right in zip(node[:3], other[:3]):
            assert part.dtype.kind == right.dtype.kind
            np.testing.assert_allclose(part, right, atol=1e-5)


@interpreted
@pytest.mark.parametrize('case, two_players, grows', [
    (replace(case, num_layers=1) if case.rotary or grows else case, two_players, grows)
    for case, two_players, grows in reanalysis.CASES.args[1]
], ids=reanalysis.CASES.kwargs['ids'])
def test_interpreted_it_is_the_compiled_reanalysis(_small: None, case: Case, two_players: bool, grows: bool,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time, each with draws of their own."""
    monkeypatch.setattr(cpu_search, 'ROWS', 2)
    monkeypatch.setattr(gpu_search, 'MOST_ROWS', 2)
    world_model, problem, latents, timesteps, _ = reanalysis.asked(case, two_players)
    search, steps = world_model.inference._gpu_search, reanalysis_timesteps_of(timesteps, reanalysis.ROWS)
    with torch.no_grad():
        visits, values, _ = search.reanalyze(problem, latents, steps, grows)
    expected = world_model.inference.in_arrays.reanalyze(problem, latents, timesteps, grows)
    assert visits == expected[0]
    np.testing.assert_allclose(values, expected[1], atol=reanalysis.TOLERANCE)
    [memory] = search._memories.kept.values()
    assert memory.rows == 2 and world_model.kv_cache_manager.memory_mb >= memory.memory_mb > 0


@pytest.mark.parametrize(('rows', 'within_limit', 'at_once'), [
    (20, sys.maxsize, 20), (600, sys.maxsize, 200), (20, 13, 7), (600, 130, 120), (20, 3, 7)])
def test_no_more_rows_of_a_reanalysis_than_memory_is_allowed_for(rows: int, within_limit: int, at_once: int) -> None:
    """A search is captured for multiples of eight rows, and for eight at least."""
    search = cached_model(Case(), 2, 5).world_model.inference._gpu_search
    assert search._rows_at_a_time(rows, within_limit) == at_once


@interpreted
def test_rows_that_only_fill_up_a_reanalysis_have_pages_of_their_own() -> None:
    world_model = cached_model(Case(), 2, 5).world_model
    problem: Any = types.SimpleNamespace(rules=make_rules(), simulations=5, slots=3, action_size=0)
    memory = GrownReanalysis(world_model.inference.engine, world_model.weights_source, 3, problem, 8, 'float32')
    before = memory.given.pages.copy(), memory.given.tables.copy()
    assert len({*before[0].ravel(), *before[1][:, 0]}) == 6 * 8
    memory.given.pages[:, :6] = 0  # as if the rows in use had others
    memory.empty_rows(6)
    assert (memory.given.pages[:, :6] == 0).all() and (memory.given.pages[:, 6:] == before[0][:, 6:]).all()
    assert (memory.given.tables == before[1]).all() and (memory.given.counts == 1).all()


@pytest.mark.parametrize('kind', [GpuMemory, Reanalysis, GrownReanalysis])
@pytest.mark.parametrize('case', [Case(rotary=True), Case(), Case(continuous=True)],
                         ids=['rotary', 'learned', 'continuous'])
def test_all_that_a_memory_holds_is_counted(case: Case, kind: Any) -> None:
    world_model = cached_model(case, 2, 5).world_model
    slots, draws = (4, case.action_space_size) if case.continuous else (case.action_space_size, 0)
    problem: Any = types.SimpleNamespace(
        rules=make_rules(sampled=draws > 0), simulations=5, slots=slots, action_size=draws)
    gc.collect()
    before = storages()
    given = world_model.inference.engine, world_model.weights_source
    own = [Slab(1, 1, 2)] if kind is GpuMemory else []
    memory = kind(*given, *own, 1 if kind is Reanalysis else 3, problem, 8, 'float32')
    made = [size for address, size in storages().items() if address not in before]
    assert memory.memory_mb * MIB == sum(made) > 8 * 6 * slots


def storages() -> Dict[int, int]:
    """Bytes of all memory that tensors have now, by address."""
    found = [part.untyped_storage() for part in gc.get_objects() if issubclass(type(part), torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def visits_of_equals(root: Root, draws_ties: bool) -> List[List[int]]:  # noqa: F811
    """Visits of the roots after one simulation, where all actions have one prior."""
    [step] = root.world_model.inference.open.steps
    logits = root.problem.logits
    if not root.problem.rules.continuous:  # actions that are drawn have one prior in any case
        logits = np.zeros_like(logits).tolist()
    problem = root.problem._replace(
        rules=root.problem.rules._replace(draws_ties=draws_ties), simulations=1, noises=None,
        legal=[[]] * compiled.ROWS, logits=logits
    )
    return root.world_model.inference._gpu_search.search(step, problem)[0]  # type: ignore[no-any-return]


def assert_equals_are_drawn_or_the_first(root: Root) -> None:  # noqa: F811
    first = [1] + [0] * (root.problem.slots - 1)
    assert visits_of_equals(root, draws_ties=False) == [first] * compiled.ROWS
    drawn = visits_of_equals(root, draws_ties=True)
    assert all(sum(row) == 1 for row in drawn) and len(set(map(tuple, drawn))) > 1


@interpreted
@pytest.mark.parametrize('case, rules', [(Case(num_layers=1), {})])
def test_interpreted_what_is_no_number_is_counted_with_its_depth(_small: None, root: Root) -> None:  # noqa: F811
    weights = root.world_model.weights_source.read(False)
    broken = weights._replace(value=lambda x: weights.value(x) + float('nan'))
    [step] = root.world_model.inference.open.steps
    search = root.world_model.inference._gpu_search
    shared = search._shared
    search._shared = shared._replace(source=altered(shared.source, read=lambda captured: broken))
    with mock.patch.object(shared.guard, 'report') as reported:
        search.search(step, root.problem)
    np.testing.assert_array_equal(reported.call_args.args[0], [[compiled.SIMULATIONS] * 2, [1] * 2])


@interpreted
@pytest.mark.parametrize('draws_ties', [False, True])
def test_interpreted_scores_that_are_no_numbers(_small: None, draws_ties: bool) -> None:
    """Of roots whose priors are none, as of a model of one's own: the first slot is taken, every time."""
    case = Case(num_layers=1)
    for asked in compiled.roots_of(cached_model(case, compiled.ROWS, 5), case, {}):
        inference, problem = asked.world_model.inference, asked.problem
        problem = problem._replace(
            rules=problem.rules._replace(draws_ties=draws_ties),
            logits=[[float('nan')] * problem.slots, *problem.logits[1:]]
        )
        [step] = inference.open.steps
        visits, _, _ = inference._gpu_search.search(step, problem)
        assert visits == root_visits(compiled.trees_of(inference._cpu_search, step, problem))
        assert max(visits[0]) == sum(visits[0]) == compiled.SIMULATIONS


@interpreted
def test_interpreted_equal_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, 'ROWS', 6)
    case = Case(num_layers=1)
    for asked in compiled.roots_of(cached_model(case, 6, 5), case, {}):
        assert_equals_are_drawn_or_the_first(asked)


@pytest.mark.parametrize('base, init', [(10, 0.3), (10, 1.25), (19652, 0.3), (19652, 1.25)])
def test_exploration_is_that_of_the_compiled_trees(base: float, init: float) -> None:
    rules = make_rules(base, init, 0.997, 0.01, False)
    others = np.arange(2000, dtype=np.float32)
    compiled_one = entry(exploration)
    np.testing.assert_array_equal(
        explorations(others, base, init), np.float32([compiled_one(rules, number) for number in others])
    )


@pytest.mark.parametrize('works', [True, False])
def test_a_capture_that_fails_is_told_once_and_searches_go_on(works: bool, lines: Any) -> None:
    tried: List[int] = []

    def make_memory(problem: Any, rows: int) -> Any:
        def capture() -> None:
            tried.append(rows)
            if not works:
                raise RuntimeError('operation not permitted\nand a long trace')
        return types.SimpleNamespace(rows=rows, memory_mb=2., capture=capture)

    case = Case()
    search = cached_model(case, 2, 5).world_model.inference._gpu_search
    shared = search._shared
    search._shared = shared._replace(source=altered(shared.source, device=lambda: torch.device('cuda', 0)))
    problem = problem_of(case, {}, [[0.] * case.action_space_size] * compiled.ROWS)
    memories = [search._memory(problem, rows, (1, ), (), make_memory) for rows in (3, ROWS_APART, 5 * ROWS_APART)]
    assert memories[0] is memories[1] and [memory.rows for memory in memories[1:]] == [ROWS_APART, 5 * ROWS_APART]
    kept = search._memories
    assert (len(tried), kept.captures, kept.usable) == ((2, 2, True) if works else (1, 0, False))
    assert kept.memory_mb == 4
    told = [message for level, message in lines() if level == 'WARNING']
    assert told == [] if works else told == [
        'A search cannot be captured here (operation not permitted): it is launched from Python from now on'
    ]


def test_numba_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU may lack it."""
    monkeypatch.setitem(sys.modules, 'lzero_kvcache.search.tree', None)
    monkeypatch.setattr(KeylessSearch, 'problem', lambda *args: 'a problem')
    searches = types.SimpleNamespace(search=lambda step, problem: Found(problem, [1.]))
    inference = types.SimpleNamespace(in_arrays=searches)
    model, roots = types.SimpleNamespace(world_model=types.SimpleNamespace(inference=inference)), Roots(1, [[]])
    search = KeylessSearch.__new__(KeylessSearch)
    search._running, step = StepsOfThread(), types.SimpleNamespace()
    search._running.steps.append(step)
    roots.prepare_no_noise([0.], [[]], None)
    search.search(roots, model, None, None)
    assert roots.found == ('a problem', [1.], None)
    assert step.visits == 'a problem'


@interpreted
@pytest.mark.parametrize('case, rules', [
    (Case(num_layers=1), {}), (Case(num_layers=1, rotary=True, continuous=True), dict(sampled=True, continuous=True)),
], ids=['learned', 'continuous'])
def test_interpreted_searches_are_replayed(_small: None, case: Case, rules: Dict[str, bool]) -> None:
    """The last with a page of one environment that is not what it was when its root was inferred."""
    options = dict(validation='exact', validation_freq=1, validation_tol=1e-3, validation_action='raise')
    model, rng = cached_model(case, compiled.ROWS, 5, kv_cache_cfg=options), np.random.default_rng(0)
    world_model, actions = model.world_model, [-1] * compiled.ROWS  # type: Any, List[Any]
    seen = torch.from_numpy(rng.normal(size=(3, compiled.ROWS, *case.obs_shape)).astype(np.float32))
    for step in range(2):
        with world_model.open_step('collect', range(compiled.ROWS)) as opened, torch.no_grad():
            output = model.initial_inference(seen[step], actions, seen[step + 1], [step] * compiled.ROWS)
            if step == 1:
                world_model.kv_cache_manager.store.slab.data[opened.roots[0][1, 0]] += 0.5
            world_model.inference._gpu_search.search(opened, problem_of(case, rules, output.policy_logits.tolist()))
            actions = [1] * compiled.ROWS
            if case.continuous:
                actions = list(rng.uniform(-1, 1, (compiled.ROWS, case.action_space_size)).astype(np.float32))
            refused = pytest.raises(RuntimeError, match='environment 1, step 1')
            with refused if step == 1 else contextlib.nullcontext():
                world_model.validator.check(opened.trace, actions)
    tally = world_model.validator.tally
    assert tally.inferences == 2 * (1 + compiled.SIMULATIONS) and 0 < tally.over == tally.unexplained
