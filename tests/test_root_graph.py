"""Root inferences that a GPU replays: by stand-ins for captures and Triton's interpreter on the CPU, and on a GPU."""
import copy
import importlib.util

import numpy as np
import pytest
import torch
from oracle import random_trace
from players import ByNode, answers_of
from small_models import BOTH_ACTIONS, BOTH_POSITIONS, Case, altered, cached_model
from test_backends import TOLERANCE, Device, copies, largest_error  # noqa: F401 (a fixture)

from lzero_kvcache.cache.pages import RESERVED_PAGES
from lzero_kvcache.engine import graphs
from lzero_kvcache.engine.kernel_check import KernelCheck

SEED = 5
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')


@pytest.fixture
def captured(monkeypatch, copies):  # noqa: F811
    """How often each capture was replayed, in turn; a replay computes anew into what the capture returned."""
    replays = []

    def capture(device, function, inputs):
        result, number = function(), len(replays)
        replays.append(0)

        def replay():
            replays[number] += 1
            for old, new in zip([*result[0], result[1]], (lambda fresh: [*fresh[0], fresh[1]])(function())):
                if old is not None:
                    old.copy_(new)

        return graphs.Captured([replay], [result], 1 + graphs.megabytes(*inputs))

    monkeypatch.setattr(graphs, 'capture', capture)
    return replays


def model_on_gpu(case, rows, backend='cudagraph'):
    """A model whose root inferences, and nothing else, believe that it is on a GPU."""
    model = cached_model(case, rows, SEED, kv_cache_cfg=dict(backend=backend))
    roots = model.world_model.inference.roots._graphs
    roots._source = altered(roots._source, device=lambda: Device('cpu'))
    roots._engine.kernels = KernelCheck(lambda device: None)
    return model


@BOTH_ACTIONS
@BOTH_POSITIONS
def test_a_trace_with_episodes_that_begin_and_contexts_that_are_lost(rotary, continuous, captured):
    case = Case(rotary=rotary, continuous=continuous)
    trace = random_trace(np.random.default_rng(SEED), case, 3, root_steps=6, simulations=2, episodes=0.3)
    model, plain = model_on_gpu(case, 3), cached_model(case, 3, SEED)
    for _ in range(2):
        assert largest_error(answers_of(model, trace, True), answers_of(plain, trace, True)) <= TOLERANCE
    assert captured == [12]
    captures, manager = model.world_model.inference.roots._graphs.replayed.graphs, model.world_model.kv_cache_manager
    [graph] = captures.kept.values()
    read = graphs.megabytes(graph.numbers.memory, graph.numbers.sent, graph.given)
    assert read > 0 and captures.memory_mb == pytest.approx(1 + read)
    assert manager.counters()['captures'] == manager.get_stats_summary()['captures'] == 1


def test_fewer_rows_need_no_capture_of_their_own_and_write_nobody_elses_page(captured):
    case = Case()
    model = model_on_gpu(case, 6)
    for rows in (6, 2, 5):
        trace = random_trace(np.random.default_rng(rows), case, rows, root_steps=3, simulations=2)
        model.world_model.forget()
        expected = answers_of(cached_model(case, rows, SEED), trace, True)
        assert largest_error(answers_of(model, trace, True), expected) <= TOLERANCE
    assert captured == [9]


def test_what_was_answered_is_not_overwritten(captured):
    case = Case()
    trace = random_trace(np.random.default_rng(SEED), case, 2, root_steps=3, simulations=2)
    answers = answers_of(model_on_gpu(case, 2), trace, True)
    assert captured == [3]
    assert largest_error(answers, answers_of(cached_model(case, 2, SEED), trace, True)) <= TOLERANCE


def test_after_an_interrupt_numbers_are_written_when_they_were_copied(captured):
    case = Case()
    trace = random_trace(np.random.default_rng(SEED), case, 2, root_steps=3, simulations=2)
    model, player = model_on_gpu(case, 2), ByNode(cached_model(case, 2, SEED))
    expected = [player.play(event) for event in trace.events]
    player.close()
    player = ByNode(model)
    answers = [player.play(event) for event in trace.events[:3]]
    [graph] = model.world_model.inference.roots._graphs.replayed.graphs.kept.values()
    copied, replay = graph.numbers._copied, graph.captured.replays[0]

    def interrupted():
        raise KeyboardInterrupt

    graph.captured.replays[0] = interrupted
    with pytest.raises(KeyboardInterrupt), player._open:
        player.play(trace.events[3])
    assert copied.pending
    pending = graph.numbers.memory.clone()

    def synchronize():
        assert torch.equal(graph.numbers.memory, pending)
        copied.pending = False

    graph.captured.replays[0] = replay
    copied.synchronize = synchronize
    answers.append(player.play(trace.events[3]))
    player.close()
    assert largest_error(answers[3:], expected[3:4]) <= TOLERANCE


def test_an_encoder_that_moves_is_captured_anew(captured):
    case = Case()
    trace = random_trace(np.random.default_rng(SEED), case, 2, root_steps=2, simulations=2)
    model = model_on_gpu(case, 2)
    answers_of(model, trace, True)
    held = []
    for parameter in model.world_model.tokenizer.encoder.parameters():
        held.append(parameter.data)
        parameter.data = parameter.data.clone()
    answers_of(model, trace, True)
    assert captured == [2, 2]
    assert model.world_model.kv_cache_manager.counters()['captures'] == 2


@pytest.mark.parametrize('backend, by_node, training', [
    ('eager', True, False), ('cudagraph', False, False), ('cudagraph', True, True),
], ids=['eager', 'by hand', 'dropout'])
def test_who_is_launched_from_python(backend, by_node, training, captured):
    case = Case()
    trace = random_trace(np.random.default_rng(SEED), case, 2, root_steps=2, simulations=2)
    answers_of(model_on_gpu(case, 2, backend).train(training), trace, by_node)
    assert not captured


def test_where_kernels_do_not_run_nothing_is_captured(captured):
    case = Case()
    trace = random_trace(np.random.default_rng(SEED), case, 2, root_steps=2, simulations=2)
    model, engine = model_on_gpu(case, 2), cached_model(case, 2, SEED).world_model.inference.engine
    model.world_model.inference.engine.kernels = KernelCheck(fail)
    answers = answers_of(model, trace, True)
    assert not captured and largest_error(answers, answers_of(cached_model(case, 2, SEED), trace, True)) <= TOLERANCE
    assert not model.world_model.inference.engine.has_kernels(torch.device('cuda'))
    engine.kernels = KernelCheck(lambda device: None)
    assert engine.has_kernels(torch.device('cuda')) and not engine.has_kernels(torch.device('cpu'))


def fail(*args, **options):
    raise RuntimeError('Failed to find C compiler')


def test_what_a_user_added_to_the_encoder_runs_at_each_step(captured):
    case, seen = Case(), []
    trace = random_trace(np.random.default_rng(SEED), case, 2, root_steps=3, simulations=2)
    model = model_on_gpu(case, 2)
    model.world_model.tokenizer.encoder.register_forward_hook(lambda *args: seen.append(args))
    answers_of(model, trace, True)
    assert not captured and len(seen) >= 3


@pytest.mark.parametrize('kind', [RuntimeError, OSError], ids=['CUDA', 'a compiler that is missing'])
def test_a_capture_that_fails_is_told_once(kind, captured, monkeypatch, lines):
    def fail(*args, **options):
        raise kind('operation not permitted when stream is capturing\nand a long trace')

    monkeypatch.setattr(graphs, 'capture', fail)
    case = Case()
    trace = random_trace(np.random.default_rng(SEED), case, 2, root_steps=3, simulations=2)
    answers = answers_of(model_on_gpu(case, 2), trace, True)
    assert largest_error(answers, answers_of(cached_model(case, 2, SEED), trace, True)) <= TOLERANCE
    [warning] = [message for level, message in lines() if level == 'WARNING']
    assert 'root inference' in warning and 'not permitted' in warning and 'long trace' not in warning


@pytest.mark.skipif(importlib.util.find_spec('triton') is None or torch.cuda.is_available(), reason='on a CPU')
@BOTH_POSITIONS
def test_interpreted_an_observation_that_is_given_is_the_step_over_a_window(rotary):
    """Of contexts of all lengths, none included."""
    case = Case(rotary=rotary)
    world_model = cached_model(case, 4, SEED).world_model
    engine, slab = world_model.inference.engine, world_model.kv_cache_manager.store.slab
    width = engine.geometry.window_pages
    slab.ensure(40, torch.device('cpu'))
    torch.manual_seed(0)
    slab.data[RESERVED_PAGES:] = torch.randn(slab.data[RESERVED_PAGES:].shape)
    counts = torch.tensor([0, 1, width - 1])
    tables = torch.arange(RESERVED_PAGES, RESERVED_PAGES + 3 * width).view(3, width)
    positions = torch.stack([(2 * counts - 1).clamp(min=0), 2 * counts])
    latent, action = torch.randn(3, engine.geometry.embed_dim), torch.tensor([0, 1, 2])
    before = slab.data.clone()
    with torch.no_grad():
        weights = world_model.weights_source.read(False)
        expected = engine.step(weights, slab, tables, counts, action, positions, latent)
        pages = slab.data.clone()
        slab.data.copy_(before)
        found = engine.simulate(weights, slab, tables, counts, action, positions, latent)
    assert found.logits_rewards is None
    for name in ('output_sequence', 'latent_state', 'logits_policy', 'logits_value'):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(slab.data[tables[1:, -1]], pages[tables[1:, -1]], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(slab.data[tables[0, -1], 1], pages[tables[0, -1], 1], atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@needs_gpu
@BOTH_ACTIONS
@BOTH_POSITIONS
def test_on_a_gpu(rotary, continuous):
    case = Case(rotary=rotary, continuous=continuous)
    trace = random_trace(np.random.default_rng(SEED), case, 5, root_steps=6, simulations=3, episodes=0.3)
    model = cached_model(case, 5, SEED, kv_cache_cfg=dict(backend='cudagraph')).to('cuda')
    expected = answers_of(cached_model(case, 5, SEED), trace, True)
    for _ in range(2):
        assert largest_error(answers_of(model, trace, True), expected) <= TOLERANCE
        model.world_model.forget()
    graph, = model.world_model.inference.roots._graphs.replayed.graphs.kept.values()
    assert graph.captured.memory_mb > 0


def test_captures_join_projections_in_one_room():
    model = cached_model(Case(), 2, SEED)
    read, manager = model.world_model.weights_source.read, model.world_model.kv_cache_manager
    before, plain = manager.memory_mb, read(False)
    first, second = read(True), read(True)
    for one, other, right in zip(first.layers, second.layers, plain.layers):
        assert one.qkv.weight.data_ptr() == other.qkv.weight.data_ptr()
        assert torch.equal(one.qkv.weight, right.qkv.weight) and torch.equal(one.qkv.bias, right.qkv.bias)
    parts = [part for layer in first.layers for part in (layer.qkv.weight, layer.qkv.bias)]
    taken = sum(part.numel() * part.element_size() for part in parts) / 2 ** 20
    assert manager.memory_mb - before == pytest.approx(taken)
    query = model.world_model.transformer.blocks[0].attn.query
    with torch.no_grad():
        query.weight.add_(1.)
    read(True)
    assert torch.equal(first.layers[0].qkv.weight[:len(query.weight)], query.weight)
    copied = copy.deepcopy(model).world_model.weights_source.read(True)
    assert copied.layers[0].qkv.weight.data_ptr() != first.layers[0].qkv.weight.data_ptr()
