"""A search on a GPU: by Triton's interpreter against the compiled search on the CPU, and on a GPU against the same
trees with the model's step by node."""
import contextlib
import gc
import importlib.util
import re
import sys
import types
from dataclasses import replace
from typing import Any, Callable, Dict, Iterator, List, Tuple
from unittest import mock

import numpy as np
import pytest
import test_compiled_search as compiled
import test_reanalysis as reanalysis
import torch
from ding.utils import MODEL_REGISTRY
from small_models import Case, cached_model, construct, original_model
from test_compiled_search import Root, problem_of, root, roots_of, search_by_steps  # noqa: F401  (a fixture)
from test_whole_search import SIMULATIONS, Player, make, validated
from torch.autograd import DeviceType

from lzero_kvcache.cache.pages import NULL_PAGE
from lzero_kvcache.config import MIB
from lzero_kvcache.engine import transfer
from lzero_kvcache.engine.graphs import MOST_KEPT
from lzero_kvcache.engine.slab import Slab
from lzero_kvcache.host.tree_search import NodeSearch, Roots
from lzero_kvcache.search import device_memory, device_search, whole
from lzero_kvcache.search.device_memory import DeviceMemory, GrownReanalysis, Reanalysis, explorations
from lzero_kvcache.search.device_search import ROWS_APART, DeviceSearch
from lzero_kvcache.search.kept_on_disk import entry
from lzero_kvcache.search.open_steps import StepsOfThread
from lzero_kvcache.search.timesteps import reanalysis_timesteps_of
from lzero_kvcache.search.tree import exploration, make_rules, root_actions, root_values, root_visits
from lzero_kvcache.search.whole import WholeSearch
from lzero_kvcache.validation.trace import Trace

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason='where there is a GPU, kernels are compiled')
pytestmark = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs triton')

SEARCHES: Dict[str, Tuple[Case, Dict[str, bool]]] = {
    'rotary': (Case(rotary=True), {}),
    'learned, two players': (Case(context_length=6, num_layers=1, num_heads=4), dict(two_players=True)),
    'learned': (Case(), {}),
    'continuous': (Case(rotary=True, continuous=True), dict(sampled=True, continuous=True)),
    'sampled discrete': (Case(sampled=True), dict(sampled=True)),
    'by index': (Case(rotary=True, sampled=True), dict(sampled=True, index_for_depth=True)),
}
CASES = pytest.mark.parametrize('case, rules', list(SEARCHES.values()), ids=list(SEARCHES))


@pytest.fixture
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes tens of milliseconds for each program: products are split over two, not over eight;
    ``test_kernels.py`` has them as they are."""
    from lzero_kvcache.engine import linear_kernels
    monkeypatch.setattr(linear_kernels, 'tiling_of', lambda *sizes: linear_kernels.Tiling(16, 64, 16, 2, 4, 3))


@pytest.fixture
def _small(_few_programs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond for each operation on a row."""
    monkeypatch.setattr(compiled, 'ROWS', 2)
    monkeypatch.setattr(compiled, 'SIMULATIONS', 4)
    monkeypatch.setattr(device_search, 'ROWS_APART', 1)
    for name, number in dict(SAMPLES=1, ROWS=4, SIMULATIONS=2).items():
        monkeypatch.setattr(reanalysis, name, number)


@interpreted
@pytest.mark.parametrize('case, rules', [
    (case if name == 'learned' else replace(case, num_layers=1), rules) for name, (case, rules) in SEARCHES.items()
], ids=list(SEARCHES))
def test_interpreted_it_is_the_compiled_search(_small: None, root: Root) -> None:  # noqa: F811
    [step] = root.world_model.inference.open.steps
    step.trace = noted = Trace('collect', step.env_ids, 1, replayed=True)
    visits, values, actions = root.world_model.inference._device.run(step, root.problem)
    [memory] = root.world_model.inference._device._memories.kept.values()
    step.trace = Trace('collect', step.env_ids, 1, replayed=True)
    tree = compiled.trees_of(root.world_model.inference._whole, step, root.problem)
    assert visits == root_visits(tree)
    np.testing.assert_allclose(values, root_values(tree), atol=3e-4)  # what float32 makes of the model's steps
    ordered = slice(None) if root.problem.rules.get('sampled') else 0  # nodes that have all actions need no order
    assert memory.tree.child.tolist() == tree.child.tolist()
    assert memory.tree.order[:, ordered].tolist() == tree.order[:, ordered].tolist()
    np.testing.assert_allclose(memory.tree.reward, tree.reward, atol=3e-4)
    np.testing.assert_allclose(memory.tree.draws, tree.draws, atol=1e-5)
    assert (actions is not None) == ('sampled' in root.problem.rules)
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
    monkeypatch.setattr(whole, 'CHUNK', 2)
    monkeypatch.setattr(device_search, 'MOST_ROWS', 2)
    world_model, problem, latents, timesteps, _ = reanalysis.asked(case, two_players)
    search, steps = world_model.inference._device, reanalysis_timesteps_of(timesteps, reanalysis.ROWS)
    with torch.no_grad():
        visits, values, _ = search.reanalyze(problem, latents, steps, world_model.weights_source.addresses(), grows)
    expected = world_model.inference.reanalyze(problem, latents, timesteps, grows)
    assert visits == expected[0]
    np.testing.assert_allclose(values, expected[1], atol=reanalysis.TOLERANCE)
    [memory] = search._memories.kept.values()
    assert memory.rows == 2 and world_model.kv_cache_manager.memory_mb >= memory.memory_mb > 0


@pytest.mark.parametrize(('rows', 'within_limit', 'at_once'), [
    (20, sys.maxsize, 20), (600, sys.maxsize, 200), (20, 13, 7), (600, 130, 120), (20, 3, 7)])
def test_no_more_rows_of_a_reanalysis_than_memory_is_allowed_for(rows: int, within_limit: int, at_once: int) -> None:
    """A search is captured for multiples of eight rows, and for eight at least."""
    search = cached_model(Case(), 2, 5).world_model.inference._device
    assert search._rows_at_a_time(rows, within_limit) == at_once


@interpreted
def test_rows_that_only_fill_up_a_reanalysis_have_pages_of_their_own() -> None:
    world_model = cached_model(Case(), 2, 5).world_model
    rules = dict(pb_c_base=19652, pb_c_init=1.25, discount_factor=0.997, value_delta_max=0.01, two_players=False)
    problem: Any = types.SimpleNamespace(rules=rules, simulations=5, slots=3, action_size=0)
    memory = GrownReanalysis(world_model.inference.engine, world_model.weights_source, 3, problem, 8)
    before = memory.given.pages.copy(), memory.given.tables.copy()
    assert len({*before[0].ravel(), *before[1][:, 0]}) == 6 * 8
    memory.given.pages[:, :6] = 0  # as if the rows in use had others
    memory.empty_rows(6)
    assert (memory.given.pages[:, :6] == 0).all() and (memory.given.pages[:, 6:] == before[0][:, 6:]).all()
    assert (memory.given.tables == before[1]).all() and (memory.given.counts == 1).all()


@pytest.mark.parametrize('kind', [DeviceMemory, Reanalysis, GrownReanalysis])
@pytest.mark.parametrize('case', [Case(rotary=True), Case(), Case(continuous=True)],
                         ids=['rotary', 'learned', 'continuous'])
def test_all_that_a_memory_holds_is_counted(case: Case, kind: Any) -> None:
    world_model = cached_model(case, 2, 5).world_model
    slots, draws = (4, case.action_space_size) if case.continuous else (case.action_space_size, 0)
    rules = dict(pb_c_base=19652, pb_c_init=1.25, discount_factor=0.997, value_delta_max=0.01, two_players=False)
    problem: Any = types.SimpleNamespace(
        rules=dict(rules, sampled=draws > 0), simulations=5, slots=slots, action_size=draws)
    gc.collect()
    before = storages()
    given = world_model.inference.engine, world_model.weights_source
    own = [Slab(1, 1, 2)] if kind is DeviceMemory else []
    memory = kind(*given, *own, 1 if kind is Reanalysis else 3, problem, 8)
    made = [size for address, size in storages().items() if address not in before]
    assert memory.memory_mb * MIB == sum(made) > 8 * 6 * slots


def storages() -> Dict[int, int]:
    """Bytes of all memory that tensors have now, by address."""
    found = [part.untyped_storage() for part in gc.get_objects() if issubclass(type(part), torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


@pytest.fixture
def on_gpu(case: Case, rules: Dict[str, bool]) -> Iterator[Root]:
    model = construct(
        MODEL_REGISTRY.get(case.model_name), case, compiled.ROWS, use_new_cache_manager=True, device='cuda',
        kv_cache_cfg=dict(on_nan='skip', search='device')
    )
    model.load_state_dict(original_model(case, 1, 5).state_dict())
    yield from roots_of(model.to('cuda').eval(), case, rules)


def searched(root: Root, **changes: Any) -> List[Any]:  # noqa: F811
    inference = root.world_model.inference
    return list(inference.search(inference.open.steps[-1], root.problem._replace(**changes)))


def visits_of_equals(root: Root, draws_ties: bool) -> List[List[int]]:  # noqa: F811
    """Visits of the roots after one simulation, where all actions have one prior."""
    [step] = root.world_model.inference.open.steps
    logits = root.problem.logits
    if 'continuous' not in root.problem.rules:  # actions that are drawn have one prior in any case
        logits = np.zeros_like(logits).tolist()
    problem = root.problem._replace(
        rules={**root.problem.rules, 'draws_ties': draws_ties}, simulations=1, noises=None,
        legal=[[]] * compiled.ROWS, logits=logits
    )
    return root.world_model.inference._device.run(step, problem)[0]  # type: ignore[no-any-return]


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
    search = root.world_model.inference._device
    search._source = search._source._replace(read=lambda captured: broken)
    with mock.patch.object(search._guard, 'report') as reported:
        search.run(step, root.problem)
    np.testing.assert_array_equal(reported.call_args.args[0], [[compiled.SIMULATIONS] * 2, [1] * 2])


@interpreted
@pytest.mark.parametrize('draws_ties', [False, True])
def test_interpreted_scores_that_are_no_numbers(_small: None, draws_ties: bool) -> None:
    """Of roots whose priors are none, as of a model of one's own: the first slot is taken, every time."""
    case = Case(num_layers=1)
    for asked in compiled.roots_of(cached_model(case, compiled.ROWS, 5), case, {}):
        inference, problem = asked.world_model.inference, asked.problem
        problem = problem._replace(
            rules=dict(problem.rules, draws_ties=draws_ties),
            logits=[[float('nan')] * problem.slots, *problem.logits[1:]]
        )
        [step] = inference.open.steps
        visits, _, _ = inference._device.run(step, problem)
        assert visits == root_visits(compiled.trees_of(inference._whole, step, problem))
        assert max(visits[0]) == sum(visits[0]) == compiled.SIMULATIONS


@interpreted
def test_interpreted_equal_scores(_few_programs: None, monkeypatch: pytest.MonkeyPatch) -> None:
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
    search = cached_model(case, 2, 5).world_model.inference._device
    search._source = search._source._replace(device=lambda: torch.device('cuda', 0))
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
    monkeypatch.setattr(NodeSearch, 'problem', lambda *args: 'a problem')
    inference = types.SimpleNamespace(search=lambda step, problem: (problem, [1.], None))
    model, roots = types.SimpleNamespace(world_model=types.SimpleNamespace(inference=inference)), Roots(1, [[]])
    search = NodeSearch.__new__(NodeSearch)
    search._running, step = StepsOfThread(), types.SimpleNamespace()
    search._running.steps.append(step)
    roots.prepare_no_noise([0.], [[]], None)
    search.search(roots, model, None, None)
    assert roots.found == ('a problem', [1.], None)
    assert step.visits == 'a problem'


@contextlib.contextmanager
def waiting_refused() -> Iterator[List[torch.Size]]:
    """Inside, waiting for the device is an error, but for what a search takes at its end; gives the shapes of that."""
    taken: List[torch.Size] = []

    def to_cpu(tensor: torch.Tensor) -> np.ndarray:
        taken.append(tensor.shape)
        torch.cuda.set_sync_debug_mode('default')
        try:
            return transfer.to_cpu(tensor)
        finally:
            torch.cuda.set_sync_debug_mode('error')

    number = torch.ones(1, device='cuda')
    with mock.patch.object(device_memory, 'to_cpu', to_cpu):
        torch.cuda.set_sync_debug_mode('error')
        try:
            with pytest.raises(RuntimeError):
                number.item()
            yield taken
        finally:
            torch.cuda.set_sync_debug_mode('default')


def copies_of(run: Callable[[], Any]) -> Tuple[List[str], List[str]]:
    """The kinds of memory on the CPU's side of all copies there and back, those inside of graphs among them."""
    torch.cuda.synchronize()
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in profiled.events() if event.device_type == DeviceType.CUDA]
    if not names:
        pytest.skip('the profiler sees nothing of this GPU')
    assert sum('select' in name for name in names) > 1
    there = re.findall(r'Memcpy HtoD \((\w+) -> ', '\n'.join(names))
    back = re.findall(r'Memcpy DtoH \(\w+ -> (\w+)\)', '\n'.join(names))
    return there, back


@pytest.mark.gpu
@needs_gpu
@CASES
class TestOnGPU:

    def test_it_is_the_search_by_steps(self, on_gpu: Root) -> None:
        visits, values, actions = searched(on_gpu)
        other = search_by_steps(on_gpu)
        assert visits == root_visits(other)
        np.testing.assert_allclose(values, root_values(other), atol=1e-5)
        if actions is not None:
            np.testing.assert_allclose(actions, root_actions(other), atol=1e-6)
        assert on_gpu.world_model.kv_cache_manager.store.slab.data[NULL_PAGE].abs().max() == 0

    def test_equal_scores(self, on_gpu: Root) -> None:
        assert_equals_are_drawn_or_the_first(on_gpu)

    def test_fewer_simulations_and_other_legal_actions_need_no_other_capture(self, on_gpu: Root) -> None:
        first = searched(on_gpu)
        kept = on_gpu.world_model.inference._device._memories.kept
        [memory] = kept.values()
        sampled = 'sampled' in on_gpu.problem.rules
        fewer = searched(on_gpu, simulations=3, legal=[[] if sampled else [1, 0]] * compiled.ROWS)
        assert all(sampled or len(row) == 2 and sum(row) == 3 for row in fewer[0])
        assert searched(on_gpu) == first and list(kept.values()) == [memory]

    def test_captures_are_bounded_and_counted(self, on_gpu: Root) -> None:
        manager, counted = on_gpu.world_model.kv_cache_manager, []
        for simulations in range(1, MOST_KEPT + 3):
            searched(on_gpu, simulations=simulations)
            counted.append(manager.counters()['memory_mb'])
        memories = on_gpu.world_model.inference._device._memories
        assert len(memories.kept) == MOST_KEPT
        assert counted[0] < counted[1] < counted[2]
        assert manager.counters()['captures'] >= memories.captures == MOST_KEPT + 2
        before = manager.counters()['captures']
        searched(on_gpu, simulations=MOST_KEPT + 2)
        assert manager.counters()['captures'] == before

    def test_nothing_waits_for_the_device_but_the_end(self, on_gpu: Root) -> None:
        first = searched(on_gpu)
        with waiting_refused() as ended:
            again = searched(on_gpu)
        assert again == first and len(ended) == 1

    def test_one_copy_goes_there_and_one_comes_back(self, on_gpu: Root) -> None:
        searched(on_gpu)
        assert copies_of(lambda: searched(on_gpu)) == (['Pinned'], ['Pinned'])

    def test_weights_that_change_in_place_are_seen(self, on_gpu: Root) -> None:
        first = searched(on_gpu)
        captured = list(on_gpu.world_model.inference._device._memories.kept.values())
        with torch.no_grad():
            for parameter in on_gpu.world_model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        visits, values, _ = searched(on_gpu)
        assert values != first[1]
        np.testing.assert_allclose(values, root_values(search_by_steps(on_gpu)), rtol=0.05, atol=0.05)
        assert list(on_gpu.world_model.inference._device._memories.kept.values()) == captured

    @pytest.mark.parametrize('matmul, most', [('tf32', 5e-3), ('bfloat16', 5e-2)])
    def test_other_products_agree_roughly(self, on_gpu: Root, matmul: str, most: float) -> None:
        inference = on_gpu.world_model.inference
        search = DeviceSearch(inference.engine, inference.shared, matmul)
        exact = searched(on_gpu, simulations=1)[1]
        values = search.run(inference.open.steps[-1], on_gpu.problem._replace(simulations=1))[1]
        assert 1e-6 < np.abs(np.subtract(values, exact)).max() < most

    def test_what_is_no_number_is_counted(self, on_gpu: Root) -> None:
        head = on_gpu.world_model.head_value
        linear = [part for part in head.modules() if isinstance(part, torch.nn.Linear)][-1]
        with torch.no_grad():
            linear.bias.fill_(float('nan'))
        visits, values, _ = searched(on_gpu)
        skipped = on_gpu.world_model.kv_cache_manager.counters()['skipped']
        assert skipped == compiled.SIMULATIONS * compiled.ROWS
        assert np.isfinite(values).all() and all(sum(row) == compiled.SIMULATIONS for row in visits)


@pytest.mark.gpu
@needs_gpu
@reanalysis.CASES
def test_on_gpu_a_reanalysis_is_that_by_steps(case: Case, two_players: bool, grows: bool) -> None:
    question = reanalysis.asked(case, two_players, grows, 'cuda')
    expected = reanalysis.by_steps(question)
    visits, values, _ = question.world_model.inference.reanalyze(*question[1:])
    assert visits == expected[0]
    np.testing.assert_allclose(values, expected[1], atol=reanalysis.TOLERANCE)
    kept = list(question.world_model.inference._device._memories.kept.values())
    with waiting_refused() as ended:
        question.world_model.inference.reanalyze(*question[1:])
    assert len(ended) == 1 and list(question.world_model.inference._device._memories.kept.values()) == kept
    copies = copies_of(lambda: question.world_model.inference.reanalyze(*question[1:]))
    assert copies == (['Pinned'], ['Pinned'])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize('kind', ['unizero', 'sampled', 'continuous'])
def test_policies_search_on_a_gpu(kind: str, lines: Any) -> None:
    policy = make(kind, changes=dict(cuda=True, device='cuda'), device='cuda')
    memories, mask = policy._model.world_model.inference._device._memories, [np.ones(5, np.int8)] * 3
    for step in range(3):
        output = policy.collect_mode.forward(
            torch.randn(3, 4, device='cuda'), [None] * 3 if kind == 'continuous' else mask, to_play=[-1] * 3,
            ready_env_id=[0, 1, 2], timestep=[np.array(step)] * 3, temperature=1., epsilon=0.
        )
    assert [sum(row['visit_count_distributions']) for row in output.values()] == [SIMULATIONS] * 3
    assert [memory.rows for memory in memories.kept.values()] == [ROWS_APART]
    assert memories.usable and memories.captures > 0
    why = 'since the model is on cuda:0, where triton runs'
    told = f'Searching in arrays, {why}: a search is a graph that is replayed for each simulation'
    assert lines().count(('INFO', told)) == 1


# ---- validation='exact' ----------------------------------------------------------------------------------------------


class OnGPU(Player):
    """Observations come to the GPU first, as LightZero's collectors send them."""

    def __init__(self, policy: Any) -> None:
        super().__init__(policy)
        self.goes_its_own_way = False  # replays go on with what was found
        forward = self.policy.forward
        self.policy = self.policy._replace(
            forward=lambda observations, *args, **kwargs: forward(observations.to('cuda'), *args, **kwargs))


def assert_all_are_replayed(policy: Any, outputs: List[Any]) -> None:
    tally, rows = policy._model.world_model.validator.tally, sum(map(len, outputs))
    assert (tally.searches, tally.over, tally.unexplained, tally.failures) == (len(outputs), 0, 0, 0)
    assert tally.rows == rows * (1 + SIMULATIONS) and tally.inferences == len(outputs) * (1 + SIMULATIONS)


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
            world_model.inference._device.run(opened, problem_of(case, rules, output.policy_logits.tolist()))
            actions = [1] * compiled.ROWS
            if case.continuous:
                actions = list(rng.uniform(-1, 1, (compiled.ROWS, case.action_space_size)).astype(np.float32))
            refused = pytest.raises(RuntimeError, match='environment 1, step 1')
            with refused if step == 1 else contextlib.nullcontext():
                world_model.validator.check(opened.trace, actions)
    tally = world_model.validator.tally
    assert tally.inferences == 2 * (1 + compiled.SIMULATIONS) and 0 < tally.over == tally.unexplained


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize('kind', ['unizero', 'discrete', 'continuous'])
@pytest.mark.parametrize('rotary', [False, True], ids=['learned', 'rotary'])
def test_on_a_gpu_searches_are_replayed(kind: str, rotary: bool) -> None:
    policy = validated(kind, rotary=rotary, changes=dict(cuda=True, device='cuda'), device='cuda')
    assert_all_are_replayed(policy, OnGPU(policy).play())
    assert policy._model.world_model.inference._device._memories.captures


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_replay_sees_a_spoiled_page() -> None:
    """Of one environment, between its root and its search."""
    policy = validated(changes=dict(cuda=True, device='cuda'), device='cuda')
    run, manager, player = WholeSearch.run, policy._model.world_model.kv_cache_manager, OnGPU(policy)
    player.step([0, 1, 2])

    def spoiled(search: Any, step: Any, problem: Any) -> Any:
        manager.store.slab.data[step.roots[0][1, 0]] += 0.5
        return run(search, step, problem)

    with mock.patch.object(WholeSearch, 'run', spoiled), pytest.raises(RuntimeError, match='environment 1, step'):
        player.step([0, 1, 2])
