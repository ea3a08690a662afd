"""A search on the device, by Triton's kernels, against the compiled search on the CPU. Where there is no GPU, Triton's
interpreter runs the kernels."""
import importlib.util
from typing import Any, List

import numpy as np
import pytest
import test_compiled_search as compiled
import torch
from oracle import Case
from test_compiled_search import Root, found, root  # noqa: F401  (a fixture)

from lzero_kvcache.search.device import DeviceSearch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs triton'),
    pytest.mark.skipif(torch.cuda.is_available(), reason='kernels are compiled, not interpreted, where there is a GPU'),
]

CASES = pytest.mark.parametrize('case, rules', [
    (Case(rotary=True), {}),
    (Case(context_length=6, num_layers=1, num_heads=4), dict(two_players=True)),
    (Case(), {}),
], ids=['rotary', 'learned, two players', 'learned'])


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes some milliseconds for each line of a row."""
    monkeypatch.setattr(compiled, 'ROWS', 4)
    monkeypatch.setattr(compiled, 'SIMULATIONS', 8)


@pytest.fixture
def search(root: Root) -> DeviceSearch:  # noqa: F811
    inference = root.world_model.inference
    return DeviceSearch(
        inference.engine, root.world_model.weights_source, root.world_model.kv_cache_manager,
        root.world_model._storage, inference._guard, inference.timings
    )


def on_device(root: Root, search: DeviceSearch, **changes: Any) -> List[Any]:  # noqa: F811
    return list(search.run(root.world_model.inference.open.steps[-1], root.problem._replace(**changes)))


@CASES
def test_a_search_on_the_device_is_the_compiled_one(root: Root, search: DeviceSearch) -> None:  # noqa: F811
    visits, values = on_device(root, search)
    expected = found(root)
    assert visits == expected[0]
    np.testing.assert_allclose(values, expected[1], atol=3e-4)  # what float32 makes of the model's steps
    [space] = search._spaces.kept.values()
    assert space.tree.child.tolist() == expected[2]
    np.testing.assert_allclose(space.tree.reward, expected[3], atol=3e-4)
