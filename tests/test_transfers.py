"""
A step is one copy to the device and one back, however many rows it has. Counted by the functions that copy, and where
there is a GPU by what PyTorch does.
"""
from collections import Counter

import numpy as np
import pytest
import torch
from ding.utils import MODEL_REGISTRY
from oracle import ClearEnv, Expand, Root, random_trace
from players import ByKey, ByNode, Placed
from small_models import BOTH_ACTIONS, BOTH_POSITIONS, Case, construct
from torch.utils._python_dispatch import TorchDispatchMode

from lzero_kvcache.engine import backends
from lzero_kvcache.search import inference, roots

SEED, ROWS = 3, 4
ON_CPU = 'cpu'
ON_GPU = pytest.param('cuda', marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
])
DEVICES = pytest.mark.parametrize('device', [ON_CPU, ON_GPU])


class Copies(TorchDispatchMode):
    """Counts copies between a CPU and a GPU."""

    def __init__(self, counted):
        super().__init__()
        self._counted = counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        source = args[1] if function is torch.ops.aten.copy_.default else args[0] if args else None
        if function is torch.ops.aten._local_scalar_dense.default:
            self._counted['back'] += source.is_cuda
        elif torch.is_tensor(source) and torch.is_tensor(output) and source.is_cuda != output.is_cuda:
            self._counted['there' if output.is_cuda else 'back'] += 1
        return output


class Counting:
    """Counts the copies of a world model's calls, of each call by itself."""

    def __init__(self, world_model, device, monkeypatch):
        self.calls, self._counted = [], Counter()
        searched = world_model.inference
        calls = [(searched.roots, 'infer'), *((searched, name) for name in ('node', 'expand', 'node_alone'))]
        for owner, name in calls:
            monkeypatch.setattr(owner, name, self._call(getattr(owner, name), device))
        if device == ON_CPU:
            places = [(owner, name) for owner in (roots, inference) for name in ('send', 'to_cpu')]
            for owner, name in [*places, (backends.Backend, 'step')]:
                way = 'back' if name == 'to_cpu' else 'there'
                monkeypatch.setattr(owner, name, self._counting(getattr(owner, name), way))

    def _call(self, function, device):

        def call(*args, **kwargs):
            self._counted.clear()
            if device == ON_CPU:
                output = function(*args, **kwargs)
            else:
                with Copies(self._counted):
                    output = function(*args, **kwargs)
            self.calls.append((self._counted['there'], self._counted['back']))
            return output

        return call

    def _counting(self, function, way):

        def call(*args, **kwargs):
            self._counted[way] += 1
            return function(*args, **kwargs)

        return call


def model_on(device, case):
    return construct(
        MODEL_REGISTRY.get(case.model_name), case, ROWS, use_new_cache_manager=True, device=device,
        kv_cache_cfg=dict(backend='eager')
    ).to(device)


def counted(player, rotary, continuous, device, monkeypatch):
    """Copies ``[(there, back)]`` of each root, one of which has lost a context, and of each node."""
    case = Case(rotary=rotary, continuous=continuous)
    model = model_on(device, case)
    trace = random_trace(np.random.default_rng(SEED), case, ROWS, root_steps=4, simulations=3)
    roots = [number for number, event in enumerate(trace.events) if isinstance(event, Root)]
    trace.events.insert(roots[2], ClearEnv(1))
    counting = Counting(model.world_model, device, monkeypatch)
    playing = player(Placed(model))
    found = {Root: [], Expand: []}
    for event in trace.events:
        cleared = isinstance(event, ClearEnv)
        if cleared:  # the context alone: its environment is followed on
            model.world_model.kv_cache_manager.clear_init_caches('collect', event.env)
        else:
            playing.play(event)
        if type(event) in found:
            found[type(event)].append(counting.calls.pop())
    playing.close()
    lost = model.world_model.kv_cache_manager.counters()['init']
    assert lost['queries'] - lost['hits'] == 1
    return found[Root], found[Expand]


@DEVICES
@BOTH_ACTIONS
@BOTH_POSITIONS
@pytest.mark.parametrize('player', [ByNode, ByKey], ids=['by node', 'by key'])
def test_roots_and_nodes_of_a_policys_search(player, rotary, continuous, device, monkeypatch):
    roots, nodes = counted(player, rotary, continuous, device, monkeypatch)
    assert roots == [(1, 1)] * 4
    # A search by key needs its roots' latent states on the CPU as well, once.
    assert nodes == [(1, 1 + (player is ByKey)), (1, 1), (1, 1)] * 4


@DEVICES
@BOTH_POSITIONS
def test_a_root_after_the_weights_changed(rotary, device, monkeypatch):
    """All contexts are gone, and that is known without a look at the last latents."""
    case = Case(rotary=rotary)
    model = model_on(device, case)
    trace = random_trace(np.random.default_rng(SEED), case, ROWS, root_steps=3, simulations=1)
    roots = [event for event in trace.events if isinstance(event, Root)]
    counting = Counting(model.world_model, device, monkeypatch)
    playing = ByNode(Placed(model))
    for root in roots:
        playing.play(root)
        playing.close()
        model.world_model.weights_changed('test')
    assert counting.calls == [(1, 1)] * 3
    counted = model.world_model.kv_cache_manager.counters()['init']
    assert (counted['queries'], counted['hits']) == (2 * ROWS, 0)
