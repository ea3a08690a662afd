"""Target values, and the roots of reanalysed policies, against LightZero's own, from buffers of random segments."""
import types

import numpy as np
import pytest
import torch
from ding.utils import deep_merge_dicts
from easydict import EasyDict
from lzero.mcts.buffer import game_buffer_unizero
from lzero.mcts.buffer.game_buffer_sampled_unizero import SampledUniZeroGameBuffer
from lzero.mcts.buffer.game_buffer_unizero import UniZeroGameBuffer
from lzero.mcts.buffer.game_segment import GameSegment
from lzero.policy.unizero import UniZeroPolicy
from oracle import TOLERANCE
from small_models import ON_MAIN, ON_RELEASE_ALONE, Case, altered, cached_model, original_model

from lzero_kvcache.host import buffers
from lzero_kvcache.host.patches import applied

SEED, UNROLL, TD, SEGMENT, BATCH = 3, 3, 2, 8, 16
CASES = {
    'learned': Case(),
    'rotary': Case(rotary=True, max_seq_len=32),
    'one layer': Case(num_layers=1, num_heads=1),
    'gated': Case(num_layers=3, gru_gating=True),
    'sampled': Case(sampled=True),
    'continuous': Case(continuous=True),
    'continuous, rotary': Case(continuous=True, rotary=True),
    'image': Case(obs_type='image'),
    'image, rotary': Case(obs_type='image', rotary=True),
    'image_memory': Case(obs_type='image_memory'),
}
OF_EACH_CASE = pytest.mark.parametrize('case', [
    pytest.param(case, id=name, marks=[ON_RELEASE_ALONE] * case.gru_gating) for name, case in CASES.items()
])


@pytest.fixture(autouse=True)
def _in_a_run():
    """Buffers as a run has them."""
    with applied(targets=buffers.targets_of_engine):
        yield


def config(case, stacked=1, **changes):
    """What a buffer is configured with."""
    shape = case.obs_shape[0] if case.obs_type == 'vector' else case.obs_shape
    return deep_merge_dicts(UniZeroPolicy.default_config(), EasyDict(dict(dict(
        model=dict(
            observation_shape=shape, image_channel=3 // stacked, frame_stack_num=stacked,
            action_space_size=case.action_space_size, continuous_action_space=case.continuous,
            model_type='mlp' if case.obs_type == 'vector' else 'conv', support_scale=5, num_of_sampled_actions=3,
            value_support_range=(-5., 6., 1.), reward_support_range=(-5., 6., 1.),
            world_model_cfg=dict(continuous_action_space=case.continuous),
        ), device='cpu', sampled_algo=case.model_name.startswith('Sampled'), num_unroll_steps=UNROLL, td_steps=TD,
        game_segment_length=SEGMENT, batch_size=BATCH, replay_buffer_size=1000, reanalyze_outdated=False,
        action_type='fixed_action_space',
    ), **changes)))


def actions_of(rng, case, shape):
    """Random actions."""
    size = case.action_space_size
    return rng.normal(size=(*shape, size)) if case.continuous else rng.integers(size, size=shape)


def filled(case, cfg, frame_of=lambda rng, case: rng.normal(size=case.obs_shape).astype(np.float32)):
    """A buffer of random segments, some of which are cut short by the end of an episode."""
    rng = np.random.default_rng(SEED)
    buffer = (SampledUniZeroGameBuffer if cfg.sampled_algo else UniZeroGameBuffer)(cfg)
    children = 3 if cfg.sampled_algo else case.action_space_size
    for length, done in ((SEGMENT, False), (5, True), (SEGMENT, False), (1, True), (SEGMENT, True)):
        segment = GameSegment(types.SimpleNamespace(n=case.action_space_size), SEGMENT, cfg)
        segment.reset([frame_of(rng, case) for _ in range(cfg.model.frame_stack_num)])
        if case.sampled:  # LightZero raises for discrete actions past an end
            length, done = SEGMENT, False
        follows = 0 if done else UNROLL + TD
        for timestep in range(length + follows):
            sampled = rng.normal(size=(3, case.action_space_size)) if case.continuous else np.arange(3)[:, None]
            segment.store_search_stats(rng.random(children).tolist(), rng.normal(), sampled)
            action = actions_of(rng, case, ())
            mask = np.ones(case.action_space_size, np.int8)
            segment.append(action, frame_of(rng, case), np.float32(rng.normal()), mask, -1, 7 + timestep)
        segment.game_segment_to_array()
        buffer._push_game_segment(segment, dict(done=done, unroll_plus_td_steps=follows, priorities=None))
    return buffer


def batch_of(buffer):
    """Contexts, actions and timesteps of a sampled batch."""
    np.random.seed(SEED)
    context, reanalysis, _, batch = buffer._make_batch(BATCH, buffer._cfg.reanalyze_ratio)
    assert 1 in context[1] and (0 in context[1] or buffer._cfg.sampled_algo), 'some run past the end of an episode'
    return context, reanalysis, batch[3 if buffer._cfg.sampled_algo else 2], batch[1], batch[-1]


def both(case):
    """The same weights in LightZero's own model, and under the new system."""
    return original_model(case, 1, SEED), cached_model(case, 1, SEED)


def assert_same(actual, expected):
    """To float tolerance of the largest number: LightZero's inverse of the value rescaling rounds as coarsely."""
    for ours, lightzeros in zip(actual, expected):
        assert ours.shape == lightzeros.shape
        np.testing.assert_allclose(ours, lightzeros, rtol=0, atol=TOLERANCE * np.abs(lightzeros).max())


@OF_EACH_CASE
@pytest.mark.parametrize('device', [
    'cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')),
])
def test_target_values(case, device):
    buffer = filled(case, config(case))
    context, _, actions, _, timesteps = batch_of(buffer)
    own, new = both(case)
    new.to(device)
    for factor in (1, 1.05):
        for parameter in (*own.parameters(), *new.parameters()):
            parameter.data = factor * parameter.data  # as DI-engine updates target models: each time in new memory
        expected = buffer._compute_target_reward_value(context, own, actions, timesteps)
        assert np.ptp(expected[1]) > 1
        assert_same(buffer._compute_target_reward_value(context, new, actions, timesteps), expected)


@OF_EACH_CASE
def test_values_policies_and_latents_of_sequences(case):
    """What LightZero's buffers ask of a target model, values and policies alike."""
    own, new = both(case)
    rng = np.random.default_rng(SEED)
    obs = torch.from_numpy(rng.normal(size=(5 * (UNROLL + 1),) + case.obs_shape).astype(np.float32))
    actions = actions_of(rng, case, (5, UNROLL))
    timesteps = rng.integers(40, size=(5, 1)) + np.arange(UNROLL)
    answers = [model.initial_inference(obs, actions, start_pos=timesteps) for model in (new, own)]
    for name in ('latent_state', 'policy_logits', 'value'):
        assert_same(*([getattr(answer, name).numpy()] for answer in answers))


@pytest.mark.parametrize('rotary', [False, True], ids=['learned', 'rotary'])
def test_reanalysed_policies_begin_with_the_same_roots(rotary, monkeypatch):
    case, given = Case(rotary=rotary), []

    class Roots:

        def __init__(self, count, legal_actions):
            self.count = count

        def prepare(self, noise_weight, noises, rewards, logits, to_play):
            given.append(logits)

        def get_distributions(self):
            return [[1.] * case.action_space_size] * self.count

    class Search:
        roots = Roots

        def __init__(self, cfg):
            pass

        def search(self, roots, model, latents, to_play, timesteps):
            given.append(latents)

    monkeypatch.setattr(game_buffer_unizero, 'MCTSCtree', Search)
    buffer = filled(case, config(case, reanalyze_ratio=1.))
    _, reanalysis, _, actions, timesteps = batch_of(buffer)
    answers = []
    for model in both(case):
        given.clear()
        buffer._compute_target_policy_reanalyzed(reanalysis, model, actions, *([] if ON_MAIN else [timesteps]))
        answers.append([np.concatenate(of_searches) for of_searches in (given[::2], given[1::2])])
    assert [len(part) for part in answers[0]] == [BATCH * (UNROLL + 1)] * 2
    assert_same(*answers)


@pytest.mark.parametrize('kind', [np.uint8, np.float32])
def test_stacked_frames_travel_as_the_buffer_has_them(kind, monkeypatch):
    """Three grey frames are an image. LightZero's own model cannot take bytes, so it is given them as floats."""
    case = Case(obs_type='image')
    own, new = both(case)

    def frame(rng, case):
        return rng.integers(256, size=(1, 64, 64), dtype=np.uint8).astype(kind)

    buffer = filled(case, config(case, stacked=3), frame)
    context, _, actions, _, timesteps = batch_of(buffer)
    as_floats = [[np.asarray(observation, np.float32) for observation in context[0]], *context[1:]]
    expected = buffer._compute_target_reward_value(as_floats, own, actions, timesteps)
    sent, to = [], torch.Tensor.to

    def noted(tensor, device, *args, **kwargs):
        sent.append((tensor.dtype, tuple(tensor.shape)))
        return to(tensor, device, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, 'to', noted)
    actual = buffer._compute_target_reward_value(context, new, actions, timesteps)
    monkeypatch.undo()
    assert_same(actual, expected)
    needed = np.reshape(context[1], (BATCH, UNROLL + 1)).any(1).sum()
    assert needed < BATCH and sent[0] == (torch.from_numpy(np.zeros(0, kind)).dtype, (needed * UNROLL, 3, 64, 64))


def test_all_past_the_end_of_their_episodes():
    case = Case()
    own, new = both(case)
    buffer = filled(case, config(case))
    context, _, actions, _, timesteps = batch_of(buffer)
    context[1] = [0] * len(context[1])
    expected = buffer._compute_target_reward_value(context, own, actions, timesteps)
    assert_same(buffer._compute_target_reward_value(context, new, actions, timesteps), expected)


def test_several_chunks_are_one(monkeypatch):
    """On a GPU observations are packed while others are encoded."""
    case = Case(obs_type='image')
    _, new = both(case)
    buffer = filled(case, config(case))
    context, _, actions, _, timesteps = batch_of(buffer)
    whole = buffer._compute_target_reward_value(context, new, actions, timesteps)
    monkeypatch.setattr(new.world_model.encoder_graph, 'chunk', lambda count: 5)
    assert_same(buffer._compute_target_reward_value(context, new, actions, timesteps), whole)


class Scaled(torch.nn.Module):
    """An encoder of a user's own, around the one that was there."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.scale = encoder, torch.nn.Parameter(torch.full((5, ), -3.))

    def forward(self, x):
        return self.encoder(x * self.scale)


def test_an_encoder_of_ones_own_is_asked():
    """Put there when the model was made already, as docs/your_project.md says."""
    case = Case()
    own, new = both(case)
    for model in (own, new):
        model.tokenizer.encoder = model.representation_network = Scaled(model.representation_network)
    buffer = filled(case, config(case))
    context, _, actions, _, timesteps = batch_of(buffer)
    expected = buffer._compute_target_reward_value(context, own, actions, timesteps)
    assert_same(buffer._compute_target_reward_value(context, new, actions, timesteps), expected)


def test_values_take_the_value_head_alone():
    case = Case()
    _, new = both(case)
    buffer = filled(case, config(case))
    context, _, actions, _, timesteps = batch_of(buffer)
    source = new.world_model.weights_source
    new.world_model.weights_source = altered(source, read=lambda captured: source.read(captured)._replace(
        rewards=None, observations=None, policy=None))
    buffer._compute_target_reward_value(context, new, actions, timesteps)
    with pytest.raises(TypeError):
        new.initial_inference(torch.zeros(8, 5), actions[:2], start_pos=timesteps[:2])


def overridden(new):
    new.initial_inference = new.initial_inference


@pytest.mark.parametrize('changes, change', [
    (dict(use_root_value=True), None), (dict(env_type='board_games'), None), ({}, torch.nn.Module.train),
    ({}, overridden),
    pytest.param(dict(bootstrap_value_context=True), None, marks=pytest.mark.skipif(not ON_MAIN, reason='of main')),
], ids=['root values', 'board games', 'training', 'own inference', 'context of values'])
def test_what_is_not_served_is_lightzeros_own(changes, change, monkeypatch):
    case, calls = Case(), []
    _, new = both(case)
    if change is not None:
        change(new)
    buffer = filled(case, config(case, **changes))
    context, _, actions, _, timesteps = batch_of(buffer)
    if buffer._cfg.use_root_value:
        context[4] = np.linspace(-1, 1, len(context[0]))
    monkeypatch.setattr(buffers, 'target_values', lambda *args: calls.append(args))
    torch.manual_seed(SEED)
    actual = buffer._compute_target_reward_value(context, new, actions, timesteps)
    torch.manual_seed(SEED)
    method = UniZeroGameBuffer._compute_target_reward_value.__wrapped__
    assert method.__module__ == game_buffer_unizero.__name__
    expected = method(buffer, context, new, actions, timesteps)
    for ours, lightzeros in zip(actual, expected):
        np.testing.assert_array_equal(ours, lightzeros)
    assert not calls
