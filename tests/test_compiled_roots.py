"""A compiled root inference is torch's, for all that follows on it too."""
import contextlib
import importlib.util
from typing import Any, Callable, Iterator, List, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from small_models import ON_MAIN, Case, cached_model
from torch import nn

from lzero_kvcache.engine.program import GELU, KIND, LAYER_NORM, LINEAR, SCALE, SIM_NORM, STANDARDIZE
from lzero_kvcache.host.network import read_network
from lzero_kvcache.search import compiled_search
from lzero_kvcache.search.roots import RootInference

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
    run_compiled = RootInference._run_compiled

    def noted(self: Any, step: Any, given: Any) -> Any:
        rows.append(len(given.pages))
        return run_compiled(self, step, given)

    with mock.patch.object(RootInference, '_run_compiled', noted):
        yield rows


def infer(model: Any, step: Step, compiled: bool) -> Any:
    """A root inference of an open step, and the contexts that it left, as torch reads them."""
    world_model = model.world_model
    with world_model.open_step('collect', range(ROWS), compiled) as opened, torch.no_grad():
        output = model.initial_inference(step.last, step.actions, step.current, step.timesteps)
        tables, counts = opened.roots
        pages = world_model.inference.shared.slab().data.numpy()[tables]
        for row, count in enumerate(counts):
            pages[row, count:] = 0
        pages[np.setdiff1d(np.arange(ROWS), opened.kept)] = 0
        pages[:, 0, 0] = 0  # an action before the first observation, which is never read
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


def test_what_each_encoder_is_compiled_to() -> None:
    """UniZero normalises by batches, its sampled form by layers; images are torch's. The main branch's ends with a
    LayerNorm."""
    last = LAYER_NORM if ON_MAIN else SIM_NORM
    kinds = {name: read_network(make_model(CASES[name]).world_model)[0].encoder[:, KIND].tolist() for name in CASES}
    assert kinds['learned'] == [LINEAR, STANDARDIZE, SCALE, GELU, LINEAR, last]
    assert kinds['continuous'] == [LINEAR, LAYER_NORM, GELU, LINEAR, last]
    assert kinds['images'] == []


@pytest.mark.parametrize('change', [lambda mlp: nn.ELU(), lambda mlp: nn.LayerNorm(32, eps=1e-3)])
def test_an_encoder_that_cannot_be_compiled_is_torchs(change: Callable[[nn.Module], nn.Module]) -> None:
    case, models = CASES['learned'], [make_model(CASES['learned']) for _ in range(2)]
    for model in models:
        mlp = model.world_model.tokenizer.encoder.fc_representation
        mlp[2] = change(mlp).eval()
    assert not len(read_network(models[0].world_model)[0].encoder)
    assert_same(case, steps_of(case, 3), *models)


def test_an_encoder_with_a_hook_is_torchs() -> None:
    case, models = CASES['learned'], [make_model(CASES['learned']) for _ in range(2)]
    for model in models:
        model.world_model.tokenizer.encoder.register_forward_hook(lambda module, given, output: output.flip(-1))
    assert_same(case, steps_of(case, 3), *models)


@pytest.mark.parametrize('name', ['learned', 'rotary', 'continuous'])
def test_contexts_that_are_missing_are_begun_anew(name: str) -> None:
    case, models = CASES[name], [make_model(CASES[name]) for _ in range(2)]
    for step in steps_of(case, 5):
        for model in models:
            for env_id in (2, 3, 11):
                model.world_model.forget('collect', env_id)
        assert_same(case, [step], *models)
    [first, other] = [model.world_model.kv_cache_manager.counters()['init'] for model in models]
    assert first == other and first['hits'] < first['queries']


def test_observations_that_are_no_numbers_are_skipped() -> None:
    case, models = CASES['learned'], [make_model(CASES['learned'], on_nan='skip') for _ in range(2)]
    steps = steps_of(case, 5)
    steps[2].current[4, 1] = float('nan')  # which is the next step's last one
    assert_same(case, steps, *models)
    assert [model.world_model.kv_cache_manager.counters()['skipped'] for model in models] == [1, 1]
    assert models[0].world_model.kv_cache_manager.counters()['init'] == \
        models[1].world_model.kv_cache_manager.counters()['init']


def test_predictions_that_are_no_numbers_are_an_error() -> None:
    model, [step] = make_model(CASES['rotary']), steps_of(CASES['rotary'], 1)
    infer(model, step, True)
    model.world_model.head_policy.head_module[-1].bias.data[1] = float('inf')
    with pytest.raises(FloatingPointError, match='A value or policy with nan or inf in collect, environment 0'):
        infer(model, step, True)
    step.current[7, 0] = float('nan')
    with pytest.raises(FloatingPointError, match='A latent state with nan or inf in collect, environment 7, step 0'):
        infer(model, step, True)


def test_threads_have_rows_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """They change no bit."""
    case, models, shares = CASES['deep'], [make_model(CASES['deep']) for _ in range(2)], []
    step_roots = compiled_search.step_roots
    monkeypatch.setattr(compiled_search, 'step_roots', lambda *args: shares.append(args[-2:]) or step_roots(*args))
    for step in steps_of(case, 3):
        alone = infer(models[0], step, True)
        torch.set_num_threads(2)
        output, pages, _ = infer(models[1], step, True)
        torch.set_num_threads(1)
        assert torch.equal(output.value, alone[0].value) and torch.equal(output.latent_state, alone[0].latent_state)
        np.testing.assert_array_equal(pages, alone[1])
    assert sorted(set(shares) - {(0, 0)}) == [(0, 9), (0, 19), (9, 19)]  # that one only has it compiled


def test_weights_that_move_are_noticed() -> None:
    """An encoder's too, which torch would see by itself."""
    case, models = CASES['learned'], [make_model(CASES['learned']) for _ in range(2)]
    first, *others = steps_of(case, 3)
    assert_same(case, [first], *models)
    for model in models:
        for module in (model.world_model.tokenizer.encoder.fc_representation[0], model.world_model.head_value):
            for parameter in module.parameters():
                parameter.data = parameter.data * 1.5
    assert_same(case, others, *models)


def test_in_training_mode_torch_steps() -> None:
    model, [step] = make_model(CASES['learned']), steps_of(CASES['learned'], 1)
    with counted() as rows:
        model.train()
        infer(model, step, True)
    assert rows == []
