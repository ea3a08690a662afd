"""
How a step is launched: eagerly or replayed, the answers are the same.

On a CPU a stand-in takes the place of a captured graph: it computes with the storage that was there when it was
captured, whatever has moved since, and into the same results every time. ``test_backends_on_gpu.py`` has real graphs.
"""
import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from oracle import TOLERANCE, Batch, play, random_trace, relative_error
from players import answers_of, largest_error
from small_models import BOTH_ACTIONS, BOTH_POSITIONS, Case, altered, cached_model

from lzero_kvcache.cache.pages import NULL_PAGE, RESERVED_PAGES, SCRATCH_PAGE
from lzero_kvcache.engine import graphs, packing
from lzero_kvcache.engine.graphs import Captured, ReplayedStep
from lzero_kvcache.engine.transfer import Pinned

SEED = 5
BOTH_WAYS = pytest.mark.parametrize('by_node', [False, True], ids=['keyed', 'by node'])


def cfg(name):
    return dict(kv_cache_cfg=dict(backend=name))


# ---- a stand-in for captures -----------------------------------------------------------------------------------------


class Device(str):
    """Tensors are sent to the CPU, and whoever looks takes it for a GPU."""
    type = 'cuda'


class StandIn:
    """A graph that computes over the storage of its capture, and into the results of its capture."""

    def __init__(self, run, slab, sent, action):
        self._run_fresh, self._slab, self._inputs = run, slab, (sent, action)
        world_model = run.__self__.source._world_model  # whose weights it reads
        self._parameters = [(parameter, parameter.data) for parameter in world_model.parameters()]
        self._pages = slab.data
        self.result = self._run()
        self.replays = 0

    def replay(self):
        self.replays += 1
        now = [parameter.data for parameter, _ in self._parameters], self._slab.data
        self._put([data for _, data in self._parameters], self._pages)
        fresh = self._run()
        self._put(*now)
        for old, new in zip([*self.result.output, self.result.search], [*fresh.output, fresh.search]):
            if old is not None:
                old.copy_(new)

    def _put(self, data, pages):
        for (parameter, _), part in zip(self._parameters, data):
            parameter.data = part
        self._slab.data = pages

    def _run(self):
        with torch.no_grad():
            return self._run_fresh(self._slab, *self._inputs)


class Copied:
    """The event after a copy from pinned memory, which must be waited for before that is written again."""

    def __init__(self):
        self.pending = False

    def record(self, stream):
        assert not self.pending
        self.pending = True

    def synchronize(self):
        self.pending = False


@pytest.fixture
def copies(monkeypatch):
    """On a CPU, what guards copies from pinned memory."""
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self: self)
    monkeypatch.setattr(torch.cuda, 'Event', Copied)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: None)


@pytest.fixture
def captured(monkeypatch, copies):
    """All captures, in turn."""
    stand_ins = []

    def capture(self, slab, rows, count, given, device):
        column = packing.filler(self._geometry, count)
        numbers = Pinned(torch.from_numpy(np.repeat(column, rows, axis=1)), device)
        held = None if given is None else torch.zeros_like(given)
        stand_ins.append(StandIn(self._function, slab, numbers.sent, held))
        return graphs._Step(Captured([stand_ins[-1].replay], [stand_ins[-1].result], 1.), numbers, held)

    monkeypatch.setattr(ReplayedStep, '_capture', capture)
    return stand_ins


def on_gpu(model):
    """Make a model's backend believe that the model is on a GPU."""
    backend = model.world_model.inference.backend
    backend.source = altered(backend.source, device=lambda: Device('cpu'))
    return model


def graph_model(case, env_num, name='cudagraph'):
    return on_gpu(cached_model(case, env_num, SEED, **cfg(name)))


class Steps:
    """
    Steps by hand of a model's backend over pages of random numbers, beside the same steps of another one's that runs
    eagerly.
    """

    def __init__(self, case=None, pages=64, rows=6, name='cudagraph'):
        case = case or Case()
        self.models = [graph_model(case, rows, name), cached_model(case, rows, SEED, **cfg('eager'))]
        for world_model in self.world_models:
            slab = world_model.kv_cache_manager.store.slab
            slab.ensure(pages, torch.device('cpu'))
            generator = torch.Generator().manual_seed(SEED)
            slab.data[RESERVED_PAGES:] = torch.randn(slab.data[RESERVED_PAGES:].shape, generator=generator)
        self._rng, self._pages = np.random.default_rng(SEED), pages
        self._weights = [None, None]
        self.new_search()

    @property
    def world_models(self):
        return [model.world_model for model in self.models]

    @property
    def backend(self):
        return self.world_models[0].inference.backend

    @property
    def slabs(self):
        return [world_model.kv_cache_manager.store.slab for world_model in self.world_models]

    def new_search(self):
        """The policies read the weights, and where they lie, once for each search."""
        with torch.no_grad():
            sources = [world_model.weights_source for world_model in self.world_models]
            self._weights = [source.read(False) for source in sources]
            self._addresses = [source.addresses() for source in sources]

    def change(self, function):
        """Do the same to both models' parameters."""
        with torch.no_grad():
            for model in self.models:
                for parameter in model.parameters():
                    function(parameter)

    def numbers(self, rows):
        geometry = self.world_models[0].inference.engine.geometry
        ids = self._rng.permutation(np.arange(RESERVED_PAGES, self._pages))
        width = geometry.window_pages - 1
        tables = ids[:rows * width].reshape(rows, width)
        counts = self._rng.integers(1, geometry.window_pages, size=rows)
        tables[np.arange(width) >= counts[:, None]] = NULL_PAGE
        written = ids[rows * width:rows * (width + 1)]
        angles = self._rng.integers(100, size=(2, rows))
        actions = self._rng.integers(3, size=rows)
        numbers = packing.pack(geometry, (tables, counts), written, tuple(angles), actions, int(counts.max()))
        return numbers, tables, written

    def step(self, rows=6, numbers=None):
        """One step of both; whether they agree on what they answer and on what they write."""
        if numbers is None:
            numbers, _, _ = self.numbers(rows)
        with torch.no_grad():
            ours, theirs = (
                world_model.inference.backend.step(weights, slab, numbers.copy(), None, addresses)
                for world_model, weights, slab, addresses in zip(
                    self.world_models, self._weights, self.slabs, self._addresses)
            )
        assert ours.search.shape == theirs.search.shape
        pages = [slab.data[RESERVED_PAGES:self._pages] for slab in self.slabs]
        parts = [(ours.search, theirs.search), tuple(pages), *zip(ours.output, theirs.output)]
        return all(relative_error(actual, expected) <= TOLERANCE for actual, expected in parts)


class TestReplays:

    @BOTH_WAYS
    @BOTH_ACTIONS
    @BOTH_POSITIONS
    def test_a_trace(self, rotary, continuous, by_node, captured):
        case = Case(rotary=rotary, continuous=continuous)
        trace = random_trace(np.random.default_rng(SEED), case, 3, root_steps=3, simulations=6, episodes=0.2)
        answers = answers_of(graph_model(case, 3), trace, by_node)
        expected = answers_of(cached_model(case, 3, SEED, **cfg('eager')), trace, by_node)
        assert len(captured) == 1
        assert captured[0].replays == 3 * 6
        assert largest_error(answers, expected) <= TOLERANCE

    @BOTH_WAYS
    @BOTH_POSITIONS
    def test_windows_that_grow_have_graphs_of_their_own(self, rotary, by_node, captured, monkeypatch):
        case = Case(rotary=rotary, context_length=20)
        trace = random_trace(np.random.default_rng(SEED), case, 3, root_steps=4, simulations=6)
        expected = answers_of(cached_model(case, 3, SEED, **cfg('eager')), trace, by_node)
        monkeypatch.setattr(packing, 'LEAST_PAGES', 2)
        answers = answers_of(graph_model(case, 3), trace, by_node)
        assert largest_error(answers, expected) <= TOLERANCE
        assert 2 <= len(captured) <= 4  # of 2, 4, 8 and 10 pages
        assert sum(graph.replays for graph in captured) == 4 * 6

    def test_a_larger_batch_has_a_graph_of_its_own(self, captured):
        steps = Steps()
        for rows in (2, 4, 2, 3, 4):
            assert steps.step(rows)
        assert [graph.result.search.shape[0] for graph in captured] == [2, 4]
        assert [graph.replays for graph in captured] == [2, 3]  # each batch in the smallest that holds it

    @BOTH_POSITIONS
    def test_rows_that_fill_up_touch_the_scratch_page_alone(self, rotary, captured):
        """Every page that no real row names is nan: a filling row that read one would be nan as well."""
        steps = Steps(Case(rotary=rotary))
        assert steps.step(6)
        numbers, tables, written = steps.numbers(2)
        named = set(tables.ravel().tolist()) | set(written.tolist()) | {NULL_PAGE}
        others = [page for page in range(64) if page not in named]
        for slab in steps.slabs:
            slab.data[others] = float('nan')
        slab = steps.slabs[0]
        before = slab.data.clone()
        with torch.no_grad():
            result = steps.backend.step(steps._weights[0], slab, numbers, None)
        same = torch.isclose(slab.data, before, rtol=0, atol=0, equal_nan=True).flatten(1).all(1)
        assert set(np.flatnonzero(~same.numpy()).tolist()) == set(written.tolist()) | {SCRATCH_PAGE}
        assert not slab.data[NULL_PAGE].any()
        assert result.search.shape[0] == 2
        assert torch.isfinite(result.search).all()
        assert torch.isfinite(captured[0].result.search).all()

    def test_weights_changed_in_place_are_seen(self, captured):
        steps = Steps()
        assert steps.step()
        steps.change(lambda parameter: parameter.mul_(1.1))
        steps.new_search()
        assert steps.step()
        state = {name: value * 0.9 for name, value in steps.models[0].state_dict().items()}
        for model in steps.models:
            model.load_state_dict(state)
        steps.new_search()
        assert steps.step()
        assert len(captured) == 1

    def test_the_stand_in_would_show_stale_weights(self, captured):
        """Or else the tests here would show nothing."""
        steps = Steps()
        assert steps.step()
        steps.change(lambda parameter: setattr(parameter, 'data', parameter.data * 1.1))
        assert not steps.step()  # in the same search storage does not move, and nobody looks

    def test_weights_whose_storage_moved_are_captured_anew(self, captured):
        steps = Steps()
        assert steps.step()
        steps.change(lambda parameter: setattr(parameter, 'data', parameter.data * 1.1))
        steps.new_search()
        assert steps.step()
        assert len(captured) == 2
        assert steps.backend.replayed.graphs.memory_mb == 1  # the first one is gone
        for _ in range(3):
            steps.new_search()
            assert steps.step()
        assert len(captured) == 2

    def test_the_weights_of_a_search_are_let_go(self, captured):
        """Those of a step that is over would be memory that nobody counts."""
        model, joined = graph_model(Case(), 2), []
        inference = model.world_model.inference
        read = inference.shared.source.read

        def noted(captured):
            weights = read(captured)
            joined.append(weakref.ref(weights.layers[0].qkv.weight))
            return weights

        shared = inference.shared
        inference.shared = shared._replace(source=altered(shared.source, read=noted))
        play(Batch(model), random_trace(np.random.default_rng(SEED), Case(), 2, root_steps=1, simulations=2))
        gc.collect()
        assert captured and joined and not [part for part in joined if part() is not None]

    def test_a_slab_that_grew_is_captured_anew(self, captured):
        """Also in the middle of a search."""
        steps = Steps()
        assert steps.step()
        for slab in steps.slabs:
            slab.ensure(100, torch.device('cpu'))
        assert steps.step()
        assert len(captured) == 2

    def test_answers_are_not_overwritten_by_the_next_step(self, captured):
        """The keyed way hands out tensors; what it gave stays as it was."""
        case = Case()
        trace = random_trace(np.random.default_rng(SEED), case, 2, root_steps=1, simulations=2)
        player = Batch(graph_model(case, 2))
        player.play(trace.events[0])
        answer = player.play(trace.events[1])
        before = {name: part.clone() for name, part in answer.items()}
        player.play(trace.events[2])
        assert captured[0].replays == 2
        assert all(torch.equal(answer[name], part) for name, part in before.items())

    def test_a_deep_copy_starts_without_graphs(self, captured):
        case = Case()
        trace = random_trace(np.random.default_rng(SEED), case, 2, root_steps=2, simulations=3)
        model = graph_model(case, 2)
        expected = answers_of(model, trace)
        target = copy.deepcopy(model)
        backend = target.world_model.inference.backend
        assert backend is not model.world_model.inference.backend
        assert backend.source.addresses() == target.world_model.weights_source.addresses()
        assert backend.source.addresses() != model.world_model.weights_source.addresses()
        assert not backend.replayed.graphs.kept
        assert backend.replayed.graphs.memory_mb == 0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert largest_error(answers_of(target, trace), expected) <= TOLERANCE
        assert len(captured) == 2

    def test_no_graph_where_dropout_is_live(self, captured):
        steps = Steps()
        for model in steps.models:
            model.train()
        steps.new_search()
        assert not steps.step()
        assert not captured
        for model in steps.models:
            model.eval()
        for own, other in zip(*(slab.data for slab in steps.slabs)):
            own.copy_(other)
        steps.new_search()
        assert steps.step()
        assert len(captured) == 1
        steps.models[0].train()
        steps.new_search()
        steps.step()
        assert captured[0].replays == 1


def warnings_of(lines):
    return [message for level, message in lines() if level == 'WARNING']


class TestGivingUp:

    def test_storage_that_moves_every_time(self, captured, monkeypatch, lines):
        monkeypatch.setattr(graphs, 'MAX_MOVES', 3)
        steps = Steps()
        for number in range(6):
            assert steps.step(), number
            steps.change(lambda parameter: setattr(parameter, 'data', parameter.data * 1.01))
            steps.new_search()
        assert len(captured) == steps.backend.replayed.graphs.captures == 3
        assert not steps.backend.replayed.graphs.kept
        assert steps.backend.replayed.graphs.memory_mb == 0
        warning, = warnings_of(lines)
        assert "backend='cudagraph'" in warning
        assert 'its storage keeps moving' in warning

    @pytest.mark.parametrize('name', ['cudagraph', 'auto'])
    def test_a_capture_that_fails(self, name, monkeypatch, lines):
        tried = []

        def capture(*args):
            tried.append(args)
            raise RuntimeError('operation not permitted when stream is capturing\nand a long trace')

        monkeypatch.setattr(ReplayedStep, '_capture', capture)
        steps = Steps(name=name)
        for _ in range(3):
            assert steps.step()
            steps.new_search()
        assert len(tried) == 1
        warning, = warnings_of(lines)
        assert 'operation not permitted when stream is capturing' in warning
        assert 'long trace' not in warning
        assert 'eager' in warning

    @pytest.mark.parametrize('name', ['auto', 'cudagraph'])
    def test_a_graph_on_a_cpu_is_eager_without_a_word(self, name, lines):
        case = Case()
        trace = random_trace(np.random.default_rng(SEED), case, 2, root_steps=1, simulations=3)
        model = cached_model(case, 2, SEED, **cfg(name))
        expected = answers_of(cached_model(case, 2, SEED, **cfg('eager')), trace)
        assert largest_error(answers_of(model, trace), expected) == 0
        assert not warnings_of(lines)
        assert not model.world_model.inference.backend.replayed.graphs.kept
