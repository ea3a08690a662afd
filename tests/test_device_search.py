"""A search on a GPU: by Triton's interpreter against the compiled search on the CPU, and on a GPU against the same
trees with the model's step by node."""
import importlib.util
from typing import Any, Dict, Iterator, List

import numpy as np
import pytest
import test_compiled_search as compiled
import torch
from ding.utils import MODEL_REGISTRY
from oracle import Case, construct, original_model
from test_compiled_search import Root, found, root, roots_of, search_by_steps  # noqa: F401  (a fixture)

from lzero_kvcache.cache.pages import NULL_PAGE
from lzero_kvcache.engine.weights import Chain, Linear, Norm, gelu
from lzero_kvcache.search.device import MAX_SPACES, DeviceSearch
from lzero_kvcache.search.tree import root_values, root_visits

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
pytestmark = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs triton')

CASES = pytest.mark.parametrize('case, rules', [
    (Case(rotary=True), {}),
    (Case(context_length=6, num_layers=1, num_heads=4), dict(two_players=True)),
    (Case(), {}),
], ids=['rotary', 'learned, two players', 'learned'])


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes a millisecond for each operation on a row."""
    monkeypatch.setattr(compiled, 'ROWS', 3)
    monkeypatch.setattr(compiled, 'SIMULATIONS', 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason='where there is a GPU, kernels are compiled')
@CASES
def test_interpreted_it_is_the_compiled_search(_small: None, root: Root) -> None:  # noqa: F811
    inference = root.world_model.inference
    search = DeviceSearch(
        inference.engine, root.world_model.weights_source, root.world_model.kv_cache_manager,
        root.world_model._storage, inference._guard, inference.timings
    )
    visits, values = search.run(inference.open.steps[-1], root.problem)
    expected = found(root)
    assert visits == expected[0]
    np.testing.assert_allclose(values, expected[1], atol=3e-4)  # what float32 makes of the model's steps
    [space] = search._spaces.kept.values()
    assert space.tree.child.tolist() == expected[2]
    np.testing.assert_allclose(space.tree.reward, expected[3], atol=3e-4)


@pytest.fixture
def on_gpu(case: Case, rules: Dict[str, bool]) -> Iterator[Root]:
    model = construct(
        MODEL_REGISTRY.get(case.model_name), case, compiled.ROWS, use_new_cache_manager=True, device='cuda',
        kv_cache_cfg=dict(on_nan='skip', search='device')
    )
    model.load_state_dict(original_model(case, 1, 5).state_dict())
    yield from roots_of(model.to('cuda').eval(), case, rules)


def searched(root: Root, **changes: Any) -> List[Any]:  # noqa: F811
    return list(root.world_model.search_on_device(root.problem._replace(**changes)))


@pytest.mark.gpu
@needs_gpu
@CASES
class TestOnGPU:

    def test_it_is_the_search_by_steps(self, on_gpu: Root) -> None:
        visits, values = searched(on_gpu)
        other = search_by_steps(on_gpu)
        assert visits == root_visits(other)
        np.testing.assert_allclose(values, root_values(other), atol=1e-5)
        assert on_gpu.world_model.kv_cache_manager.storage.slab.data[NULL_PAGE].abs().max() == 0

    def test_fewer_simulations_and_other_legal_actions_need_no_other_capture(self, on_gpu: Root) -> None:
        first = searched(on_gpu)
        kept = on_gpu.world_model.inference._device._spaces.kept
        [space] = kept.values()
        fewer = searched(on_gpu, simulations=3, legal=[[1, 0]] * compiled.ROWS)
        assert all(len(row) == 2 and sum(row) == 3 for row in fewer[0])
        assert searched(on_gpu) == first and list(kept.values()) == [space]

    def test_captures_are_bounded_and_counted(self, on_gpu: Root) -> None:
        manager, counted = on_gpu.world_model.kv_cache_manager, []
        for simulations in range(1, MAX_SPACES + 3):
            searched(on_gpu, simulations=simulations)
            counted.append(manager.counters()['memory_mb'])
        assert len(on_gpu.world_model.inference._device._spaces.kept) == MAX_SPACES
        assert counted[0] < counted[1] < counted[2]

    def test_weights_that_change_in_place_are_seen(self, on_gpu: Root) -> None:
        first = searched(on_gpu)
        captured = list(on_gpu.world_model.inference._device._spaces.kept.values())
        with torch.no_grad():
            for parameter in on_gpu.world_model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        visits, values = searched(on_gpu)
        assert values != first[1]
        np.testing.assert_allclose(values, root_values(search_by_steps(on_gpu)), rtol=0.05, atol=0.05)
        assert list(on_gpu.world_model.inference._device._spaces.kept.values()) == captured

    def test_what_is_no_number_is_counted(self, on_gpu: Root) -> None:
        head = on_gpu.world_model.head_value
        linear = [part for part in head.modules() if isinstance(part, torch.nn.Linear)][-1]
        with torch.no_grad():
            linear.bias.fill_(float('nan'))
        visits, values = searched(on_gpu)
        skipped = on_gpu.world_model.kv_cache_manager.counters()['skipped']
        assert skipped == compiled.SIMULATIONS * compiled.ROWS
        assert np.isfinite(values).all() and all(sum(row) == compiled.SIMULATIONS for row in visits)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize('rows', [1, 8, 17, 64, 200, 300])
@pytest.mark.parametrize('outputs, inputs', [(2304, 768), (101, 768), (768, 3072)])
def test_products_are_exact(rows: int, outputs: int, inputs: int) -> None:
    from lzero_kvcache.engine import products

    x, weight, bias = (torch.randn(size, device='cuda') for size in ((rows, inputs), (outputs, inputs), (outputs, )))
    for added in (bias, None):
        right = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
        difference = products.apply(Linear(weight, added, rows), x) - right
        assert difference.abs().max() <= 2e-6 * right.abs().max()
    layer, norm = Linear(weight, bias, rows), Norm((outputs, ), weight[:, 0].contiguous(), bias, 1e-5)
    residual = torch.randn(rows, outputs, device='cuda')
    exact = residual + torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    total, normed = products.residual_norm(layer, x, residual, norm)
    assert (total - exact).abs().max() <= 2e-6 * exact.abs().max()
    torch.testing.assert_close(normed, norm(total), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        products.apply(Chain((layer, gelu)), x), gelu(products.apply(layer, x)), atol=2e-5, rtol=1e-5
    )
