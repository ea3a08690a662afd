"""Steps of a model that is on a GPU, launched eagerly and as replayed graphs; what is right is computed on the CPU."""
import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ding.utils import MODEL_REGISTRY
from oracle import TOLERANCE, Batch, LightZeroAlone, play, random_reanalysis, random_trace
from players import Placed, answers_of, largest_error
from small_models import (
    BOTH_ACTIONS,
    BOTH_POSITIONS,
    ORIGINAL_MODELS,
    Case,
    cached_model,
    construct,
    original_model,
    randomise,
)
from test_backends import BOTH_WAYS, SEED, cfg

from lzero_kvcache.engine import packing
from lzero_kvcache.engine.graphs import capture
from lzero_kvcache.engine.step import SHORT_WINDOW, _attend_elementwise
from lzero_kvcache.host import weights as layouts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')]


def on_cuda(case, env_num, name, **overrides):
    model = construct(
        MODEL_REGISTRY.get(case.model_name), case, env_num, use_new_cache_manager=True, device='cuda', **cfg(name),
        **overrides
    )
    model.load_state_dict(original_model(case, 1, SEED).state_dict())
    return model.to('cuda')


def lightzero_on_cuda(case):
    """LightZero's own model, alone."""
    model = randomise(construct(ORIGINAL_MODELS[case.model_name], case, 1, device='cuda').to('cuda'), case, SEED)
    if not case.rotary:
        model.world_model.precompute_pos_emb_diff_kv()
    return LightZeroAlone(model)


def alone_on_cuda(case, trace, env):
    player = lightzero_on_cuda(case)
    player.model = Placed(player.model)
    return [
        {name: part.cpu() for name, part in answer.items()} for answer in play(player, trace.alone(env)) if answer
    ]


def rows_of(answers, row):
    return [{name: part[row:row + 1] for name, part in answer.items()} for answer in answers]


@pytest.mark.parametrize('rows', [8, 40, 64])
@pytest.mark.parametrize(('context_length', 'least_pages'), [(8, packing.LEAST_PAGES), (20, 2), (80, 40)])
@BOTH_ACTIONS
@BOTH_POSITIONS
def test_every_way_gives_one_answer(rotary, continuous, context_length, least_pages, rows, monkeypatch):
    monkeypatch.setattr(packing, 'LEAST_PAGES', least_pages)
    assert 8 <= SHORT_WINDOW < 80 and 8 < layouts.MANY_CAPTURED_ROWS < 40 < min(layouts.MANY_ROWS.values())
    case = Case(rotary=rotary, continuous=continuous, context_length=context_length)
    trace = random_trace(np.random.default_rng(SEED), case, rows, root_steps=3, simulations=5, episodes=0.2)
    expected = answers_of(cached_model(case, rows, SEED, **cfg('eager')), trace)
    for name in ('eager', 'cudagraph'):
        model = on_cuda(case, rows, name)
        for by_node in (False, True):
            model.world_model.forget()
            assert largest_error(answers_of(model, trace, by_node), expected) <= TOLERANCE, (name, by_node)
        assert (model.world_model.inference.backend.replayed.graphs.memory_mb > 0) == (name == 'cudagraph')
    for env in (0, rows - 1):
        right = alone_on_cuda(case, trace, env)
        assert largest_error(rows_of(expected, env), right) <= TOLERANCE


@BOTH_POSITIONS
def test_reanalysis(rotary):
    case = Case(rotary=rotary)
    event = random_reanalysis(np.random.default_rng(SEED), case, samples=12, simulations=4)
    expected = Batch(cached_model(case, 1, SEED)).play(event)
    for name in ('eager', 'cudagraph'):
        answer = Batch(Placed(on_cuda(case, 1, name))).play(event)
        assert largest_error([{key: part.cpu() for key, part in answer.items()}], [expected]) <= TOLERANCE


@BOTH_WAYS
@BOTH_POSITIONS
def test_weights_that_an_optimizer_changes(rotary, by_node):
    """In place and without a word: a fused optimizer moves no version counter."""
    case = Case(rotary=rotary)
    trace = random_trace(np.random.default_rng(SEED), case, 4, root_steps=2, simulations=4)
    model = on_cuda(case, 4, 'cudagraph')
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
    before = answers_of(model, trace, by_node)
    graphs = dict(model.world_model.inference.backend.replayed.graphs.kept)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    model.world_model.weights_changed('test')  # as the policies do after an update
    after = answers_of(model, trace, by_node)
    other = cached_model(case, 4, SEED, **cfg('eager'))
    other.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    assert largest_error(after, answers_of(other, trace, by_node)) <= TOLERANCE
    assert largest_error(after, before) > 1e-2
    assert model.world_model.inference.backend.replayed.graphs.kept == graphs


@BOTH_WAYS
def test_storage_that_moves(by_node, monkeypatch):
    """Weights of other values in new storage, and a slab that grows."""
    case = Case()
    trace = random_trace(np.random.default_rng(SEED), case, 4, root_steps=2, simulations=4)
    model, other = on_cuda(case, 4, 'cudagraph'), cached_model(case, 4, SEED, **cfg('eager'))
    answers_of(model, trace, by_node)
    held = []  # so that no old address is handed out again
    for each in (model, other):
        for parameter in each.parameters():
            held.append(parameter.data)
            parameter.data = parameter.data * 1.1
    model.world_model.forget()
    other.world_model.forget()
    assert largest_error(answers_of(model, trace, by_node), answers_of(other, trace, by_node)) <= TOLERANCE
    assert model.world_model.inference.backend.replayed.graphs.moves == 1
    manager = model.world_model.kv_cache_manager
    held.append(manager.store.slab.data)
    manager._pages.grow(manager.page_capacity + 100)
    model.world_model.forget()
    other.world_model.forget()
    assert largest_error(answers_of(model, trace, by_node), answers_of(other, trace, by_node)) <= TOLERANCE
    assert model.world_model.inference.backend.replayed.graphs.moves == 2


@BOTH_WAYS
def test_smaller_batches(by_node):
    case = Case()
    model = on_cuda(case, 8, 'cudagraph')
    for rows in (8, 5, 1, 8, 3):
        trace = random_trace(np.random.default_rng(rows), case, rows, root_steps=2, simulations=4)
        model.world_model.forget()
        expected = answers_of(cached_model(case, rows, SEED, **cfg('eager')), trace, by_node)
        assert largest_error(answers_of(model, trace, by_node), expected) <= TOLERANCE
    assert len(model.world_model.inference.backend.replayed.graphs.kept) == 1


def test_no_graph_where_dropout_is_live():
    case = Case()
    trace = random_trace(np.random.default_rng(SEED), case, 2, root_steps=1, simulations=3)
    model = on_cuda(case, 2, 'cudagraph').train()
    answers_of(model, trace)
    assert not model.world_model.inference.backend.replayed.graphs.kept


@pytest.mark.parametrize('rows', [1, 31, 40, 256])
@pytest.mark.parametrize('length', [1, 7, 64])
def test_attention_over_a_few_tokens(rows, length):
    query, context = torch.randn(rows, 1, 8, 96).cuda(), torch.randn(rows, length, 2, 8, 96).cuda()
    keys, values = context.permute(2, 0, 3, 1, 4)
    query = query.transpose(1, 2)
    expected = F.scaled_dot_product_attention(query, keys, values)
    torch.testing.assert_close(_attend_elementwise(query, keys, values, None), expected, rtol=1e-4, atol=1e-5)


def test_what_captures_hold_is_counted():
    """All memory that only graphs can use, and no library's besides."""
    def held():
        torch.cuda.synchronize()
        return sum(
            part['total_size'] for part in torch.cuda.memory_snapshot() if tuple(part['segment_pool_id']) != (0, 0)
        ) / 2 ** 20

    kept = torch.randn(1024, 1024, device='cuda')
    state = {}

    def first():
        state['copy'] = kept + 1  # the next run's takes the place of this one
        return state['copy']

    gc.collect()
    torch.cuda.empty_cache()
    before = held()
    captured = [capture(kept.device, first, lambda: state['copy'] @ kept) for _ in range(3)]
    assert all(part.memory_mb > 0 for part in captured)
    assert sum(part.memory_mb for part in captured) == pytest.approx(held() - before)
