"""In new mode nothing of LightZero's own caching is allocated or called."""
from unittest import mock

import numpy as np
import pytest
import torch
from builders import Worker, audit, make_policy, roots
from ding.utils import MODEL_REGISTRY
from lzero.model.unizero_world_models import kv_caching
from lzero.model.unizero_world_models import world_model as lightzero_world_model
from lzero.model.unizero_world_models.transformer import Transformer
from lzero.model.unizero_world_models.world_model import WorldModel as LightZeroWorldModel
from lzero.worker import MuZeroEvaluator
from oracle import Batch, play, random_reanalysis, random_trace
from scripted import COLLECTORS, Life, quiet
from seeded_search import seeded_search
from small_models import BOTH_POSITIONS, ON_MAIN, Case, cached_model, construct

from lzero_kvcache.host import refused

SEED = 3
#: LightZero's helpers and where they are.
OLD = {
    'custom_copy_kv_cache_to_shared_init_envs': LightZeroWorldModel,
    'custom_copy_kv_cache_to_shared_wm': LightZeroWorldModel,
    'custom_copy_kv_cache_to_shared_recur': LightZeroWorldModel,
    'trim_and_pad_kv_cache': LightZeroWorldModel,
    'update_cache_context': LightZeroWorldModel,
    'retrieve_or_generate_kvcache': LightZeroWorldModel,
    'generate_empty_keys_values': Transformer,
}
#: What LightZero's constructor allocates.
POOLS = ('shared_pool_recur_infer', 'shared_pool_init_infer', 'shared_pool_wm', 'keys_values_wm_single_env',
         'keys_values_wm_single_env_tmp', 'keys_values_wm')


pytestmark = pytest.mark.usefixtures('at_the_root')


@pytest.fixture
def forbidden(monkeypatch):
    """Whoever calls one of the helpers fails, and so does whoever makes a container of keys and values."""

    def fail(name):
        def run(*args, **kwargs):
            raise AssertionError(f'{name} was called')
        return run

    monkeypatch.setattr(refused, 'KNOWN', (*refused.KNOWN, __name__))  # or these would be refused
    for name, owner in OLD.items():
        monkeypatch.setattr(owner, name, fail(name))
    monkeypatch.setattr(kv_caching.KeysValues, '__init__', fail('KeysValues'))


DORMANT = 'calculate_dormant_ratio' if ON_MAIN else 'cal_dormant_ratio'


def dormant(model, *args, **kwargs):
    return torch.tensor(0.5)


def whole_life(new, folder, kind='episodes', **options):
    """Collection, evaluation, two updates with everything reanalyzed, then all again with contexts of before."""
    life = Life((0, 1, 2), new, folder, analysis_dormant_ratio=True, max_blocks=10, max_tokens=20, **options)
    # LightZero's analysis of dormant neurons looks for its encoder under a name that its tokenizer does not have, and
    # calls the world model without timesteps, which fails; what comes before and after it is what is asked for here.
    tokenizer = life.policy._model.world_model.tokenizer
    vars(tokenizer)['representation_network'] = tokenizer.encoder
    buffer = life.buffer()
    collector, evaluator = life.worker(COLLECTORS[kind]), life.worker(MuZeroEvaluator)
    for train_iter in range(2):
        life.evaluate(evaluator, train_iter=train_iter, n_episode=3)
        life.fill(buffer, collector)
        with quiet(), seeded_search(), mock.patch.object(lightzero_world_model, DORMANT, dormant):
            data = buffer.sample(2, life.policy)
            life.policy.recompute_pos_emb_diff_and_clear_cache()
            losses = life.policy.learn_mode.forward([*data, train_iter])
        assert ON_MAIN or losses['analysis/dormant_ratio_world_model'] == 0.5  # whose own analysis fails
    # The policy's periodic clearing, which reaches into the model.
    with quiet():
        life.policy.collect_mode.reset(0, current_steps=200, reset_init_data=False)
        life.policy.eval_mode.reset(0, current_steps=200, reset_init_data=False)
    life.close()
    return life


class TestNothingIsCalled:

    @pytest.mark.usefixtures('forbidden')
    @pytest.mark.parametrize('kind', list(COLLECTORS))
    @BOTH_POSITIONS
    def test_a_whole_life(self, rotary, kind, tmp_path):
        life = whole_life(True, tmp_path, kind, rotary=rotary)
        counters = life.cache.counters()
        assert counters['recur']['hits'] > 0
        assert counters['init']['hits'] > 0
        audit(life.cache)
        audit(life.policy._target_model.world_model.kv_cache_manager)

    def test_the_original_calls_every_one(self, tmp_path):
        """Or else the test above would show nothing."""
        with mock.patch.multiple(
            LightZeroWorldModel,
            **{name: counting(owner, name) for name, owner in OLD.items() if owner is LightZeroWorldModel}
        ), mock.patch.object(Transformer, 'generate_empty_keys_values', counting(
            Transformer, 'generate_empty_keys_values'
        )):
            whole_life(False, tmp_path)
            assert [name for name, owner in OLD.items() if not getattr(owner, name).calls] == []

    @pytest.mark.usefixtures('forbidden')
    @pytest.mark.parametrize('continuous', [False, True], ids=['discrete', 'continuous'])
    @BOTH_POSITIONS
    def test_a_model_by_key(self, rotary, continuous):
        """Roots, nodes, contexts that were thrown away and are made anew, and a reanalysis."""
        case = Case(rotary=rotary, continuous=continuous)
        model = construct(MODEL_REGISTRY.get(case.model_name), case, 3, use_new_cache_manager=True)
        rng = np.random.default_rng(SEED)
        trace = random_trace(rng, case, 3, root_steps=4, simulations=6, clears=0.3, episodes=0.2, unknown=0.5)
        trace.events.append(random_reanalysis(rng, case, samples=2, simulations=3))
        answers = [answer for answer in play(Batch(model), trace) if answer]
        assert len(answers) == 4 * 7 + 1
        counters = model.world_model.kv_cache_manager.counters()
        assert counters['init']['misses'] + counters['recur']['misses'] > 0


def counting(owner, name):
    """The same function, which counts its calls."""
    function = getattr(owner, name)

    def run(*args, **kwargs):
        run.calls += 1
        return function(*args, **kwargs)

    run.calls = 0
    return run


class TestNothingIsAllocated:

    def test_no_pool_no_container_and_no_table_of_positions(self):
        """Before and after use; positions are learned ones, for which the original has a table."""
        policy = make_policy(True, rotary=False)
        world_model = policy._model.world_model
        for _ in range(2):
            for model in (policy._model, policy._target_model):
                assert not [name for name in (*POOLS, 'pos_emb_diff_k') if hasattr(model.world_model, name)]
            assert not containers(world_model)
            Worker(policy).step([0, 1, 2])
        assert world_model.kv_cache_manager.memory_mb > 0

    def test_the_original_has_them(self):
        world_model = make_policy(False, rotary=False)._model.world_model
        assert all(hasattr(world_model, name) for name in (*POOLS, 'pos_emb_diff_k'))
        assert containers(world_model)


def containers(world_model):
    """Names of the attributes that hold a ``KeysValues``, or a list with one."""
    found = []
    for name, value in vars(world_model).items():
        parts = value if isinstance(value, (list, tuple)) else [value]
        parts = [inner for part in parts for inner in (part if isinstance(part, list) else [part])]
        if any(isinstance(part, kv_caching.KeysValues) for part in parts):
            found.append(name)
    return found


def test_precomputing_positions_changes_nothing():
    """Which LightZero's policy calls."""
    model = cached_model(Case(), 3, SEED)
    play(Batch(model), random_trace(np.random.default_rng(SEED), Case(), 3, root_steps=2, simulations=4))
    world_model = model.world_model
    state = {name: value.clone() for name, value in world_model.state_dict().items()}
    for _ in range(2):
        assert roots(world_model.kv_cache_manager) == [2, 2, 2] and len(world_model.kv_cache_manager.recur_pool) == 12
        world_model.precompute_pos_emb_diff_kv()
    assert all(torch.equal(value, state[name]) for name, value in world_model.state_dict().items())
