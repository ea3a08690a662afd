"""A compiled root inference is torch's, for all that follows on it too."""
import contextlib
import importlib.util
from typing import Any, Iterator, List, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from oracle import Case, cached_model
from torch import nn

from lzero_kvcache.search.root_step import CompiledRoots

pytestmark = pytest.mark.skipif(importlib.util.find_spec('numba') is None, reason='needs numba')

ROWS = 19
TOLERANCE = 1e-4

CASES = {
    'learned': Case(),
    'rotary': Case(rotary=True),
    'deep': Case(num_layers=3, num_heads=4, embed_dim=48, context_length=20, action_space_size=5),
    'continuous': Case(continuous=True),
    'continuous-rotary': Case(continuous=True, rotary=True, num_heads=4, embed_dim=64, max_seq_len=32),
    'sampled-discrete': Case(sampled=True, action_space_size=9),
    'images': Case(obs_type='image', num_layers=1),
}


@pytest.fixture(params=CASES)
def case(request: Any) -> Case:
    """Each kind of model."""
    return CASES[request.param]


class Step(NamedTuple):
    """What LightZero passes for one root inference."""
    last: torch.Tensor  # [B, ...]
    actions: List[Any]
    current: torch.Tensor  # [B, ...]
    timesteps: List[int]


def steps_of(case: Case, count: int) -> List[Step]:
    """Of episodes that begin at different times."""
    rng = np.random.default_rng(0)
    obs = torch.from_numpy(rng.normal(size=(count + 1, ROWS, *case.obs_shape)).astype(np.float32))
    steps, age = [], np.zeros(ROWS, int)
    for number in range(count):
        age = np.where(rng.random(ROWS) < 0.2, 0, age + 1) if number else age
        taken = rng.integers(0, case.action_space_size, ROWS)
        if case.continuous:
            taken = rng.uniform(-1, 1, (ROWS, case.action_space_size)).astype(np.float32)
        actions = [action if after else -1 for action, after in zip(taken, age)]
        steps.append(Step(obs[number], actions, obs[number + 1], age.tolist()))
    return steps


def make_model(case: Case, **cache: Any) -> Any:
    """A model whose encoder normalises, where it is an MLP, by what it might have gathered in training."""
    model = cached_model(case, ROWS, 5, kv_cache_cfg=cache)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@contextlib.contextmanager
def counted() -> Iterator[List[int]]:
    """How many rows each compiled root inference had."""
    rows: List[int] = []
    step = CompiledRoots.step

    def noted(self: Any, served: Any, given: Any) -> Any:
        rows.append(len(given.pages))
        return step(self, served, given)

    with mock.patch.object(CompiledRoots, 'step', noted):
        yield rows


def infer(model: Any, step: Step, compiled: bool) -> Any:
    """A root inference of a served step, and the contexts that it left, as torch reads them."""
    world_model = model.world_model
    with world_model.serving('collect', range(ROWS), compiled) as served, torch.no_grad():
        output = model.initial_inference(step.last, step.actions, step.current, step.timesteps)
        tables, counts = served.roots
        pages = world_model._ready_slab().data.numpy()[tables]
        for row, count in enumerate(counts):
            pages[row, count:] = 0
        pages[counts == np.asarray(step.timesteps) + 1, 0, 0] = 0  # an action before the first observation: never read
        return output, pages, counts


def assert_same(case: Case, steps: List[Step], one: Any, other: Any) -> None:
    """Both models answer each step the same, and keep the same."""
    with counted() as rows:
        for step in steps:
            actual, pages, counts = infer(one, step, True)
            expected, other_pages, other_counts = infer(other, step, False)
            for name in ('latent_state', 'policy_logits', 'value'):
                np.testing.assert_allclose(
                    getattr(actual, name), getattr(expected, name), TOLERANCE, TOLERANCE, err_msg=name
                )
            np.testing.assert_array_equal(counts, other_counts)
            np.testing.assert_allclose(pages, other_pages, TOLERANCE, TOLERANCE)
    assert rows == [ROWS] * len(steps)


def test_root_inferences_are_torchs(case: Case) -> None:
    """Through beginnings of episodes and windows that slide."""
    assert_same(case, steps_of(case, 2 + case.context_length // 2), make_model(case), make_model(case))
