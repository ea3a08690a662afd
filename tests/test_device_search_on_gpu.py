"""A search on a GPU against the same trees with the model's step by node; what it copies, waits for and captures."""
import contextlib
import re
from typing import Any, Callable, Dict, Iterator, List, Tuple
from unittest import mock

import numpy as np
import pytest
import test_compiled_search as compiled
import test_reanalysis as reanalysis
import torch
from ding.utils import MODEL_REGISTRY
from small_models import Case, construct, original_model
from test_compiled_search import Root, roots_of, search_by_steps
from test_device_search import SEARCHES, assert_equals_are_drawn_or_the_first, needs_triton
from test_whole_search import SIMULATIONS, Player, make, validated
from torch.autograd import DeviceType

from lzero_kvcache.cache.pages import NULL_PAGE
from lzero_kvcache.engine import transfer
from lzero_kvcache.engine.graphs import MOST_KEPT
from lzero_kvcache.search import gpu_memory
from lzero_kvcache.search.array_search import ArraySearch
from lzero_kvcache.search.gpu_search import ROWS_APART, GpuSearch
from lzero_kvcache.search.tree import root_actions, root_values, root_visits

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU'), needs_triton]
CASES = pytest.mark.parametrize('case, rules', list(SEARCHES.values()), ids=list(SEARCHES))


@pytest.fixture
def on_gpu(case: Case, rules: Dict[str, bool]) -> Iterator[Root]:
    model = construct(
        MODEL_REGISTRY.get(case.model_name), case, compiled.ROWS, use_new_cache_manager=True, device='cuda',
        kv_cache_cfg=dict(on_nan='skip', search='device')
    )
    model.load_state_dict(original_model(case, 1, 5).state_dict())
    yield from roots_of(model.to('cuda').eval(), case, rules)


def searched(root: Root, **changes: Any) -> List[Any]:
    inference = root.world_model.inference
    return list(inference.in_arrays.search(inference.open.steps[-1], root.problem._replace(**changes)))


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
    with mock.patch.object(gpu_memory, 'to_cpu', to_cpu):
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
        kept = on_gpu.world_model.inference._gpu_search._memories.kept
        [memory] = kept.values()
        sampled = on_gpu.problem.rules.sampled
        fewer = searched(on_gpu, simulations=3, legal=[[] if sampled else [1, 0]] * compiled.ROWS)
        assert all(sampled or len(row) == 2 and sum(row) == 3 for row in fewer[0])
        assert searched(on_gpu) == first and list(kept.values()) == [memory]

    def test_captures_are_bounded_and_counted(self, on_gpu: Root) -> None:
        manager, counted = on_gpu.world_model.kv_cache_manager, []
        for simulations in range(1, MOST_KEPT + 3):
            searched(on_gpu, simulations=simulations)
            counted.append(manager.counters()['memory_mb'])
        memories = on_gpu.world_model.inference._gpu_search._memories
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
        captured = list(on_gpu.world_model.inference._gpu_search._memories.kept.values())
        with torch.no_grad():
            for parameter in on_gpu.world_model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        visits, values, _ = searched(on_gpu)
        assert values != first[1]
        np.testing.assert_allclose(values, root_values(search_by_steps(on_gpu)), rtol=0.05, atol=0.05)
        assert list(on_gpu.world_model.inference._gpu_search._memories.kept.values()) == captured

    @pytest.mark.parametrize('matmul, most', [('tf32', 5e-3), ('bfloat16', 5e-2)])
    def test_other_products_agree_roughly(self, on_gpu: Root, matmul: str, most: float) -> None:
        inference = on_gpu.world_model.inference
        search = GpuSearch(inference.shared, matmul)
        exact = searched(on_gpu, simulations=1)[1]
        values = search.search(inference.open.steps[-1], on_gpu.problem._replace(simulations=1))[1]
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


@reanalysis.CASES
def test_on_gpu_a_reanalysis_is_that_by_steps(case: Case, two_players: bool, grows: bool) -> None:
    question = reanalysis.asked(case, two_players, grows, 'cuda')
    expected = reanalysis.by_steps(question)
    visits, values, _ = question.world_model.inference.in_arrays.reanalyze(*question[1:])
    assert visits == expected[0]
    np.testing.assert_allclose(values, expected[1], atol=reanalysis.TOLERANCE)
    kept = list(question.world_model.inference._gpu_search._memories.kept.values())
    with waiting_refused() as ended:
        question.world_model.inference.in_arrays.reanalyze(*question[1:])
    assert len(ended) == 1 and list(question.world_model.inference._gpu_search._memories.kept.values()) == kept
    copies = copies_of(lambda: question.world_model.inference.in_arrays.reanalyze(*question[1:]))
    assert copies == (['Pinned'], ['Pinned'])


@pytest.mark.parametrize('kind', ['unizero', 'sampled', 'continuous'])
def test_policies_search_on_a_gpu(kind: str, lines: Any) -> None:
    policy = make(kind, changes=dict(cuda=True, device='cuda'), device='cuda')
    memories, mask = policy._model.world_model.inference._gpu_search._memories, [np.ones(5, np.int8)] * 3
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


@pytest.mark.parametrize('kind', ['unizero', 'discrete', 'continuous'])
@pytest.mark.parametrize('rotary', [False, True], ids=['learned', 'rotary'])
def test_on_a_gpu_searches_are_replayed(kind: str, rotary: bool) -> None:
    policy = validated(kind, rotary=rotary, changes=dict(cuda=True, device='cuda'), device='cuda')
    assert_all_are_replayed(policy, OnGPU(policy).play())
    assert policy._model.world_model.inference._gpu_search._memories.captures


def test_on_a_gpu_a_replay_sees_a_spoiled_page() -> None:
    """Of one environment, between its root and its search."""
    policy = validated(changes=dict(cuda=True, device='cuda'), device='cuda')
    run, manager, player = ArraySearch.search, policy._model.world_model.kv_cache_manager, OnGPU(policy)
    player.step([0, 1, 2])

    def spoiled(search: Any, step: Any, problem: Any) -> Any:
        manager.store.slab.data[step.roots[0][1, 0]] += 0.5
        return run(search, step, problem)

    with mock.patch.object(ArraySearch, 'search', spoiled), pytest.raises(RuntimeError, match='environment 1, step'):
        player.step([0, 1, 2])
