"""Kernels by themselves: products with what follows on them, and attention over pages. Without a GPU they are
interpreted."""
import importlib.util

import pytest
import torch
from small_models import Case, original_model

from lzero_kvcache.engine.kernel_check import KernelCheck
from lzero_kvcache.engine.slab import Slab
from lzero_kvcache.engine.step import Engine
from lzero_kvcache.engine.weights import Chain, Linear, Norm, gelu
from lzero_kvcache.host.weights import ModelWeights

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason='where there is a GPU, kernels are compiled')
pytestmark = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs triton')


@pytest.mark.parametrize('place', [pytest.param('cpu', marks=interpreted),
                                   pytest.param('cuda', marks=[pytest.mark.gpu, needs_gpu])])
def test_where_kernels_run_the_probe_says_so(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lzero_kvcache.engine import kernel_launch

    assert KernelCheck().why_not(torch.device(place)) is None
    monkeypatch.setattr(kernel_launch, 'launch', lambda *args, **options: None)
    missing = KernelCheck().why_not(torch.device(place))
    assert missing is not None and 'a kernel wrote [0.0' in missing


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize('rotary', [False, True])
def test_long_contexts_are_split_over_programs(device: str, rotary: bool) -> None:
    """Also where those of some rows are so short that nothing is left for most programs."""
    from lzero_kvcache.engine.paged_attention import splitting

    if device == 'cpu' and torch.cuda.is_available():
        pytest.skip('where there is a GPU, kernels are compiled')
    counts, width = torch.tensor([1, 40, 65], device=device), 66
    case = Case(context_length=2 * width, rotary=rotary, num_layers=1)
    model = original_model(case, 1, 5).to(device).world_model
    source, tables = ModelWeights(model), torch.randperm(3 * width, device=device).view(3, width) + 1
    engine, weights, slabs = Engine(source.geometry), source.read(False), [Slab(1, 2, 16), Slab(1, 2, 16)]
    for slab in slabs:
        torch.manual_seed(0)
        slab.data = torch.randn(3 * width + 1, *slab.page_shape, device=device)
    before = 2 * counts - 1
    asked = tables, counts, torch.arange(3, device=device), torch.stack([before, before + 1])
    with torch.no_grad():
        right = engine.step(weights, slabs[0], *asked)
        found = engine.simulate(weights, slabs[1], *asked)
    assert splitting(2 * width, 3 * 2).splits == 4
    for name, part in found._asdict().items():
        torch.testing.assert_close(part, getattr(right, name), atol=1e-4, rtol=1e-4, msg=name)
    torch.testing.assert_close(slabs[1].data, slabs[0].data, atol=1e-4, rtol=1e-4)


def test_short_contexts_are_not_split() -> None:
    from lzero_kvcache.engine.paged_attention import splitting

    assert splitting(8, 64).splits == splitting(62, 64).splits == splitting(512, 512).splits == 1
    assert splitting(512, 32).splits == 16 and splitting(512, 64).splits == 8


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize('wide', [48, 3072])
def test_norms_among_products(device: str, wide: int) -> None:
    """As in the heads of LightZero's main branch."""
    from lzero_kvcache.engine import linear_kernels

    if device == 'cpu' and torch.cuda.is_available():
        pytest.skip('where there is a GPU, kernels are compiled')
    torch.manual_seed(0)
    rows, narrow = 3, 40

    def linear(outputs: int, inputs: int) -> Linear:
        weight = torch.randn(outputs, inputs, device=device) / inputs ** 0.5
        return Linear(weight, torch.randn(outputs, device=device), rows)

    def norm(size: int, affine: bool = True) -> Norm:
        weight, bias = torch.randn(2, size, device=device) if affine else (None, None)
        return Norm((size, ), weight, bias, 1e-5)

    x = torch.randn(rows, narrow, device=device)
    for parts in ((norm(narrow), linear(wide, narrow), norm(wide), gelu, linear(narrow, wide), norm(narrow)),
                  (norm(narrow), gelu), (linear(wide, narrow), gelu, norm(wide)),
                  (linear(wide, narrow), norm(wide, affine=False), gelu)):
        torch.testing.assert_close(linear_kernels.apply(Chain(parts), x), Chain(parts)(x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize('other, launches', [
    ('alike', 4), ('with a norm at the end', 5), ('without a bias', 6), ('of another width', 6), ('longer', 8),
    ('with norms, as on the main branch', 5)
])
def test_two_heads_are_computed_together(device: str, other: str, launches: int,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as they are alike; and each is what it is alone."""
    from lzero_kvcache.engine import linear_kernels

    if device == 'cpu' and torch.cuda.is_available():
        pytest.skip('where there is a GPU, kernels are compiled')
    torch.manual_seed(0)
    rows, embed = 5, 24

    def linear(outputs: int, inputs: int = embed, biased: bool = True) -> Linear:
        weight = torch.randn(outputs, inputs, device=device) / inputs ** 0.5
        return Linear(weight, torch.randn(outputs, device=device) if biased else None, rows)

    def norm(size: int) -> Norm:
        return Norm((size, ), *torch.randn(2, size, device=device), 1e-5)

    first = Chain((linear(embed), gelu, linear(37)))
    if other == 'with norms, as on the main branch':
        first = Chain((norm(embed), linear(96), norm(96), gelu, linear(37, 96)))
    second = {
        'alike': (linear(embed), gelu, linear(70)),
        'with a norm at the end': (linear(embed), gelu, linear(70), torch.tanh, norm(70)),
        'without a bias': (linear(embed), gelu, linear(70, biased=False)),
        'of another width': (linear(40), gelu, linear(70, 40)),
        'longer': (linear(embed), gelu, linear(33), gelu, linear(70, 33)),
        'with norms, as on the main branch': (norm(embed), linear(96), norm(96), gelu, linear(70, 96), torch.tanh),
    }[other]
    x = torch.randn(rows, embed, device=device)
    expected = linear_kernels.apply(first, x), linear_kernels.apply(Chain(second), x)
    launched = []
    launch = linear_kernels.launch
    monkeypatch.setattr(linear_kernels, 'launch', lambda *args, **options: launched.append(launch(*args, **options)))
    both = linear_kernels.apply_both(first, Chain(second), x)
    assert len(launched) == launches
    for one, right in zip(both, expected):
        torch.testing.assert_close(one, right, atol=1e-6, rtol=1e-6)
        assert one.is_contiguous()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize('rows', [1, 8, 17, 64, 200, 300])
@pytest.mark.parametrize('outputs, inputs', [(2304, 768), (101, 768), (768, 3072)])
def test_products_are_exact(rows: int, outputs: int, inputs: int) -> None:
    from lzero_kvcache.engine import linear_kernels

    x, weight, bias = (torch.randn(size, device='cuda') for size in ((rows, inputs), (outputs, inputs), (outputs, )))
    for added in (bias, None):
        right = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
        difference = linear_kernels.apply(Linear(weight, added, rows), x) - right
        assert difference.abs().max() <= 2e-6 * right.abs().max()
    layer, norm = Linear(weight, bias, rows), Norm((outputs, ), weight[:, 0].contiguous(), bias, 1e-5)
    residual = torch.randn(rows, outputs, device='cuda')
    exact = residual + torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    total, normed = linear_kernels.residual_norm(layer, x, residual, norm)
    assert (total - exact).abs().max() <= 2e-6 * exact.abs().max()
    torch.testing.assert_close(normed, norm(total), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        linear_kernels.apply(Chain((layer, gelu)), x), gelu(linear_kernels.apply(layer, x)), atol=2e-5, rtol=1e-5
    )
    narrow = Linear(weight[:100].contiguous(), bias[:100], rows)
    for together, alone in zip(linear_kernels.apply_both(narrow, layer, x), (narrow, layer)):
        right = linear_kernels.apply(alone, x)  # whose inner dimension is in other parts
        assert (together - right).abs().max() <= 2e-6 * right.abs().max()


@pytest.mark.filterwarnings('ignore:.* encountered in')
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize('scale, weight_scale', [(1e6, 1), (1, 1e4), (0.003, 1), (1, 0.0001)])
def test_products_of_numbers_that_halves_do_not_reach(device: str, scale: float, weight_scale: float) -> None:
    """Nor is a row wrong whose neighbour has no number."""
    from lzero_kvcache.engine import linear_kernels

    if device == 'cpu' and torch.cuda.is_available():
        pytest.skip('where there is a GPU, kernels are compiled')
    torch.manual_seed(0)
    x, weight = torch.randn(5, 96, device=device), weight_scale * torch.randn(40, 96, device=device)
    x[1:3] *= scale
    x[4, 7] = float('nan')
    found = linear_kernels.apply(Linear(weight, None, 5), x)
    right = torch.nn.functional.linear(x.double(), weight.double())
    assert ((found - right).abs().amax(1) <= 2e-6 * right.abs().amax(1))[:4].all()
    assert found[4].isnan().all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize('matmul, least, most', [('tf32', 1e-5, 1e-3), ('bfloat16', 1e-4, 1e-2)])
@pytest.mark.parametrize('rows', [8, 64, 256])
def test_other_products_are_as_exact_as_they_say(rows: int, matmul: str, least: float, most: float) -> None:
    from lzero_kvcache.engine import linear_kernels

    x, weight = torch.randn(rows, 768, device='cuda'), torch.randn(2304, 768, device='cuda')
    right = torch.nn.functional.linear(x.double(), weight.double())
    weight = weight.bfloat16() if matmul == 'bfloat16' else weight
    difference = linear_kernels.apply(Linear(weight, None, rows, matmul), x) - right
    assert least < difference.abs().max() / right.abs().max() < most
