"""A simulation compiled for the CPU is the engine's step, number by number.

``B`` is the number of rows, ``R`` the pages that a context has at most.
"""
import contextlib
import functools
import importlib.util
import io
from typing import Any, NamedTuple, Optional

import numpy as np
import pytest
import torch
from small_models import ON_MAIN, Case, cached_model

from lzero_kvcache.engine.compiling import entry
from lzero_kvcache.engine.packing import pack, unpack
from lzero_kvcache.engine.program import Batch, Network, PagedNetwork
from lzero_kvcache.engine.slab import Slab
from lzero_kvcache.host.network import read_network, what_is_missing

pytestmark = pytest.mark.skipif(importlib.util.find_spec('numba') is None, reason='needs numba')

#: Largest error that counts as the same, relative to numbers of size 1 and more.
TOLERANCE = 1e-5

LARGEST_PLACE = 1000

CASES = {
    'learned': Case(),
    'rotary': Case(rotary=True),
    'deep': Case(num_layers=3, num_heads=4, embed_dim=48, context_length=20, action_space_size=5),
    'shallow': Case(num_layers=1, num_heads=1, context_length=4),
    'continuous': Case(continuous=True),
    'continuous-rotary': Case(continuous=True, rotary=True, num_heads=4, embed_dim=64, max_seq_len=32),
    'sampled-discrete': Case(sampled=True, action_space_size=9),
    'small-heads': Case(num_heads=8, embed_dim=32),
}


@pytest.fixture(params=CASES)
def case(request: Any) -> Case:
    """Each kind of model."""
    return CASES[request.param]


class Contexts(NamedTuple):
    """Random contexts, and what follows them."""
    slab: Slab
    tables: np.ndarray  # [B, R]
    counts: np.ndarray  # [B]
    pages: np.ndarray  # [B]
    actions: np.ndarray  # [B] or [B, A]
    places: np.ndarray  # [2, B]


class Predicted(NamedTuple):
    """What a simulation says, and the pages that it leaves."""
    reward: np.ndarray  # [B]
    value: np.ndarray  # [B]
    policy: np.ndarray  # [B, P]
    pages: torch.Tensor


@functools.lru_cache(maxsize=None)
def simulate() -> Any:
    """The simulation, compiled by itself."""
    from lzero_kvcache.engine import compiled_step

    return entry(compiled_step.simulate)


def make_model(case: Case) -> Any:
    """A world model with random weights."""
    with contextlib.redirect_stdout(io.StringIO()):
        world_model = cached_model(case, 2, 0).world_model.eval()
    world_model.reserve_angles(0, LARGEST_PLACE // 2)
    return world_model


def make_contexts(world_model: Any, rows: int, seed: int, count: Optional[int] = None) -> Contexts:
    """Pages full of random numbers, in random order; of 1 to R pages, or of ``count``."""
    rng, geometry = np.random.default_rng(seed), world_model.weights_source.geometry
    width = geometry.window_pages - 1
    slab = Slab(geometry.layers, geometry.heads, geometry.head_dim)
    slab.ensure(2 + rows * (width + 1), torch.device('cpu'))
    slab.data[2:].normal_(generator=torch.Generator().manual_seed(seed))
    ids = rng.permutation(np.arange(2, len(slab.data))).reshape(rows, width + 1)
    counts = rng.integers(1, width + 1, rows) if count is None else np.full(rows, count)
    tables = np.where(np.arange(width) < counts[:, None], ids[:, :width], 0)
    size = world_model.action_space_size
    actions = rng.integers(0, size, rows)
    if world_model.continuous_action_space:
        actions = rng.normal(size=(rows, size)).astype(np.float32)
    return Contexts(slab, tables, counts, ids[:, width].copy(), actions, rng.integers(0, LARGEST_PLACE, (2, rows)))


def by_engine(world_model: Any, contexts: Contexts) -> Predicted:
    """What the engine's step says. Scalars are taken from its logits in float64, since near 0 the rescaling takes the
    difference of almost equal numbers."""
    slab, tables, counts, pages, actions, places = contexts
    engine, weights = world_model.inference.engine, world_model.weights_source.read(False)
    before = slab.data.clone()
    with torch.no_grad():
        angles = places[0], places[1]
        numbers = torch.from_numpy(pack(engine.geometry, (tables, counts), pages, angles, actions, counts.max()))
        page_ids, page_counts, positions, action = unpack(engine.geometry, numbers)
        output = engine.step(weights, slab, page_ids, page_counts, action, positions)
        packed = engine.for_search(weights, output.map(torch.Tensor.double)).numpy()
    after = slab.data.clone()
    slab.data.copy_(before)
    return Predicted(packed[:, 0], packed[:, 1], packed[:, 2:], after)


def compiled_by(world_model: Any, contexts: Contexts, network: Optional[Network] = None,
                chunks: Optional[list] = None) -> Predicted:
    """What the compiled simulation says, for all rows at once or in chunks."""
    from lzero_kvcache.engine.layers import ROWS, new_scratch

    slab, tables, counts, pages, actions, places = contexts
    rows, geometry = len(counts), world_model.weights_source.geometry
    before = slab.data.clone()
    if network is None:
        network, _ = read_network(world_model)
    shift = world_model.weights_source.read(False).shift
    nothing = np.zeros((1, geometry.layers, 2, geometry.embed_dim), np.float32)
    shift = nothing if shift is None else shift.detach().numpy()
    reward, value = np.full((2, rows), np.nan, dtype=np.float32)
    policy = np.full((rows, network.policy), np.nan, dtype=np.float32)
    batch = Batch(
        tables, counts, pages, places, actions.reshape(rows, -1).astype(np.float32), reward=reward, value=value,
        policy=policy
    )
    paged = PagedNetwork(network, shift, slab.data.numpy())
    for low, high in chunks or [(low, min(low + ROWS, rows)) for low in range(0, rows, ROWS)]:
        simulate()(paged, batch, new_scratch(network, tables.shape[1]), low, high - low)
    after = slab.data.clone()
    slab.data.copy_(before)
    return Predicted(reward, value, policy, after)


def assert_close(actual: Predicted, expected: Predicted) -> None:
    """Every number is the same, to rounding."""
    for name, one, other in zip(Predicted._fields, actual, expected):
        np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize('rows', [1, 7, 8, 19, 70])
def test_simulation_is_the_engines_step(case: Case, rows: int) -> None:
    """Contexts of all lengths at once; among 70 rows are some beyond those that are worked on together."""
    world_model = make_model(case)
    contexts = make_contexts(world_model, rows, seed=rows)
    assert_close(compiled_by(world_model, contexts), by_engine(world_model, contexts))


def test_windows_that_just_began_and_full_ones(case: Case) -> None:
    world_model = make_model(case)
    for count in (1, world_model.weights_source.geometry.window_pages - 1):
        contexts = make_contexts(world_model, 9, seed=count, count=count)
        assert_close(compiled_by(world_model, contexts), by_engine(world_model, contexts))


def test_simulations_build_on_each_other() -> None:
    """Through slides: each step's page is the last one of the next context."""
    world_model = make_model(CASES['learned'])
    contexts = make_contexts(world_model, 5, seed=3, count=1)
    slab, tables, counts, pages, actions, places = contexts
    for _ in range(6):
        expected = by_engine(world_model, contexts)
        actual = compiled_by(world_model, contexts)
        assert_close(actual, expected)
        slab.data.copy_(actual.pages)
        if counts[0] == tables.shape[1]:
            pages, tables = tables[:, 0].copy(), np.concatenate([tables[:, 1:], pages[:, None]], axis=1)
        else:
            tables[np.arange(5), counts] = pages
            counts, pages = counts + 1, np.arange(5) + len(slab.data) - 5
            slab.data[pages] = 0
            pages = _unused(slab, tables, counts)
        contexts = Contexts(slab, np.ascontiguousarray(tables), counts, pages, actions, places)
    assert (counts == tables.shape[1]).all()


def _unused(slab: Slab, tables: np.ndarray, counts: np.ndarray) -> np.ndarray:
    used = {page for row, count in zip(tables, counts) for page in row[:count]}
    return np.array([page for page in range(2, len(slab.data)) if page not in used][:len(counts)])


def test_chunks_are_the_whole(case: Case) -> None:
    world_model = make_model(case)
    contexts = make_contexts(world_model, 21, seed=1)
    whole = compiled_by(world_model, contexts)
    parts = compiled_by(world_model, contexts, chunks=[(13, 21), (0, 5), (5, 13)])
    for one, other in zip(parts, whole):
        np.testing.assert_array_equal(one, other)


def test_threads_share_nothing() -> None:
    """Two threads with scratch of their own say what one says."""
    from concurrent.futures import ThreadPoolExecutor

    world_model = make_model(CASES['learned'])
    contexts = [make_contexts(world_model, 24, seed=seed) for seed in range(6)]
    alone = [compiled_by(world_model, each) for each in contexts]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda each: compiled_by(world_model, each), contexts))
    for one, other in zip(together, alone):
        np.testing.assert_array_equal(one.policy, other.policy)
        np.testing.assert_array_equal(one.value, other.value)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_touch_no_others(bad: float) -> None:
    world_model = make_model(CASES['learned'])
    contexts = make_contexts(world_model, 11, seed=2)
    expected = compiled_by(world_model, contexts)
    contexts.slab.data[contexts.tables[4, 0]] = bad
    actual = compiled_by(world_model, contexts)
    others = np.arange(11) != 4
    assert not np.isfinite(actual.value[4])
    assert not np.isfinite(actual.policy[4]).any()
    for one, other in zip(actual[:3], expected[:3]):
        np.testing.assert_array_equal(one[others], other[others])
    assert torch.equal(actual.pages[contexts.pages[others]], expected.pages[contexts.pages[others]])


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_a_new_page_held_before_is_not_read(bad: float) -> None:
    """Rows of a tile go as far as its longest, whose tokens are beyond the others' own."""
    world_model = make_model(CASES['learned'])
    contexts = make_contexts(world_model, 11, seed=2)
    expected = compiled_by(world_model, contexts)
    contexts.slab.data[contexts.pages] = bad
    for one, other in zip(compiled_by(world_model, contexts), expected):
        np.testing.assert_array_equal(one, other)


def test_nothing_but_its_own_page_is_written() -> None:
    world_model = make_model(CASES['rotary'])
    contexts = make_contexts(world_model, 11, seed=2)
    after = compiled_by(world_model, contexts).pages
    others = np.setdiff1d(np.arange(len(after)), contexts.pages)
    assert torch.equal(after[others], contexts.slab.data[others])


def test_weights_that_change_in_place_are_seen_at_once(case: Case) -> None:
    """What was read once is read no more: every weight, also those that no other test tells apart."""
    world_model = make_model(case)
    contexts = make_contexts(world_model, 6, seed=4)
    network, kept = read_network(world_model)
    before = compiled_by(world_model, contexts, network)
    with torch.no_grad():
        for parameter in world_model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.ndim)))
    after = compiled_by(world_model, contexts, network)
    assert abs(after.value - before.value).max() > 1e-4
    assert_close(after, by_engine(world_model, contexts))
    assert len(kept) > 20


@pytest.mark.parametrize('sigma_type', ['fixed', 'independent', 'conditioned'])
@pytest.mark.parametrize('bound_type', ['tanh', None])
def test_policy_heads_of_continuous_actions(sigma_type: str, bound_type: Optional[str]) -> None:
    from ding.model.common import ReparameterizationHead

    world_model = make_model(CASES['continuous'])
    torch.manual_seed(0)
    world_model.head_policy.head_module = ReparameterizationHead(
        32, 3, layer_num=2, sigma_type=sigma_type, activation=torch.nn.GELU(approximate='tanh'), bound_type=bound_type
    )
    contexts = make_contexts(world_model, 9, seed=0)
    assert what_is_missing(world_model, torch.float32) is None
    assert_close(compiled_by(world_model, contexts), by_engine(world_model, contexts))


def test_heads_that_normalise(case: Case) -> None:
    """As LightZero's main branch has them: before the first linear layer, and in between."""
    world_model = make_model(case)
    for head in (world_model.head_rewards, world_model.head_observations, world_model.head_value):
        first, *others = [part for part in head.head_module if not isinstance(part, torch.nn.LayerNorm)]
        norms = [torch.nn.LayerNorm(size).eval() for size in (first.in_features, first.out_features)]
        for norm in norms:
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
        head.head_module = torch.nn.Sequential(norms[0], first, norms[1], *others)
    contexts = make_contexts(world_model, 19, seed=19)
    assert_close(compiled_by(world_model, contexts), by_engine(world_model, contexts))


def test_what_cannot_be_compiled_is_told() -> None:
    world_model = make_model(CASES['learned'])
    assert what_is_missing(world_model, torch.float32) is None
    assert what_is_missing(world_model, torch.float16) == 'pages are kept as torch.float16'
    world_model.head_value.head_module[1] = torch.nn.GELU()
    assert 'GELU' in what_is_missing(world_model, torch.float32)
    if not ON_MAIN:
        assert 'gated' in what_is_missing(make_model(Case(gru_gating=True)), torch.float32)
    assert 'torch.float64' in what_is_missing(make_model(CASES['learned']).double(), torch.float32)
    happo = make_model(CASES['continuous'])
    happo.head_policy.head_module.sigma_type = 'happo'
    assert 'happo' in what_is_missing(happo, torch.float32)
