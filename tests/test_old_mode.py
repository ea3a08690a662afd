"""The flag off: LightZero's own code, bit for bit, with and without the plugin."""
import contextlib
import copy
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ding.utils import MODEL_REGISTRY
from forks import environment
from oracle import OriginalBatch, play, random_reanalysis, random_trace
from small_models import ORIGINAL_MODELS, Case, adapter, construct, randomise

import lzero_kvcache

FLAGS = pytest.mark.parametrize('flag', [{}, {'use_new_cache_manager': False}], ids=['absent', 'False'])
CASES = pytest.mark.parametrize(
    'case', [Case(), Case(rotary=True), Case(sampled=True), Case(continuous=True)],
    ids=['learned', 'rotary', 'sampled', 'continuous']
)


def pair(case, env_num=3, **flag):
    """LightZero's own model and the registered one, constructed from the same seed; and the random states after it."""
    made = []
    for model_class, overrides in ((ORIGINAL_MODELS[case.model_name], {}), (MODEL_REGISTRY.get(case.model_name), flag)):
        torch.manual_seed(7)
        np.random.seed(7)
        model = construct(model_class, case, env_num, **overrides)
        made.append((model, torch.get_rng_state(), np.random.get_state()[1]))
    return made


@CASES
@FLAGS
class TestModel:

    def test_construction(self, case, flag):
        """The same weights, drawn from the same random numbers."""
        (theirs, *their_states), (ours, *our_states) = pair(case, **flag)
        assert torch.equal(our_states[0], their_states[0])
        assert (our_states[1] == their_states[1]).all()
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
        parts = [
            [type(part).__name__ for part in model.modules() if part not in (model, model.world_model)]
            for model in (ours, theirs)
        ]
        assert parts[0] == parts[1]

    def test_answers(self, case, flag):
        """With all of LightZero's faults, to the last bit."""
        (theirs, *_), (ours, *_) = pair(case, **flag)
        for model in (theirs, ours):
            randomise(model, case, 3)
            if not case.rotary:
                model.world_model.precompute_pos_emb_diff_kv()
        rng = np.random.default_rng(3)
        trace = random_trace(rng, case, 3, root_steps=5, simulations=6, episodes=0.2)
        trace.events.append(random_reanalysis(rng, case, samples=2, simulations=2))
        for expected, actual in zip(play(OriginalBatch(theirs), trace), play(OriginalBatch(ours), trace)):
            assert expected.keys() == actual.keys()
            for name in expected:
                assert torch.equal(actual[name], expected[name])
        for name in ('hit_count', 'total_query_count', 'root_hit_cnt', 'root_total_query_cnt'):
            assert getattr(ours.world_model, name) == getattr(theirs.world_model, name)
        assert theirs.world_model.total_query_count > 0

    def test_its_caches_are_lightzeros(self, case, flag):
        (theirs, *_), (ours, *_) = pair(case, **flag)
        for name in ('past_kv_cache_init_infer_envs', 'past_kv_cache_recurrent_infer', 'keys_values_wm_list'):
            assert type(getattr(ours.world_model, name)) is type(getattr(theirs.world_model, name))
        for name in (adapter().RECURRENT_SLOTS, 'shared_pool_size_init', 'shared_pool_size_wm'):
            assert getattr(ours.world_model, name) == getattr(theirs.world_model, name)


@CASES
class TestStates:

    @pytest.mark.parametrize('to_new', [False, True], ids=['new to old', 'old to new'])
    def test_they_load_either_way(self, case, to_new):
        source, target = (
            construct(MODEL_REGISTRY.get(case.model_name), case, 2, use_new_cache_manager=flag)
            for flag in (not to_new, to_new)
        )
        target.load_state_dict(source.state_dict())
        for name, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], value)


@pytest.mark.parametrize('new', [False, True], ids=['old', 'new'])
def test_a_deep_copy_has_a_cache_of_its_own(new):
    """As the policy makes its target model."""
    case = Case()
    model = construct(MODEL_REGISTRY.get(case.model_name), case, 2, use_new_cache_manager=new)
    play(OriginalBatch(model), random_trace(np.random.default_rng(0), case, 2, root_steps=2, simulations=2))
    target = copy.deepcopy(model)
    ours, theirs = model.world_model.kv_cache_manager, target.world_model.kv_cache_manager
    queries = ours.counters()['recur']['queries']
    assert queries == theirs.counters()['recur']['queries'] == 2 * 2 * 2
    play(OriginalBatch(target), random_trace(np.random.default_rng(0), case, 2, root_steps=2, simulations=2))
    assert ours.counters()['recur']['queries'] == queries
    assert theirs.counters()['recur']['queries'] == 2 * queries
    with contextlib.redirect_stdout(io.StringIO()):
        target.world_model.clear_caches()
    ours, theirs = (manager.get_stats_summary()['init_pools'] for manager in (ours, theirs))
    assert sum(pool['size'] for pool in theirs.values()) == 0
    assert sum(pool['size'] for pool in ours.values()) > 0


TRAINING = """
import contextlib, copy, hashlib, io, itertools, json, os, random, sys
with contextlib.redirect_stdout(io.StringIO()):
    import numpy as np
    import torch
    from ding.utils import MODEL_REGISTRY, import_module
    from forks import in_forks
    from lzero.entry import train_unizero
    from seeded_search import seeded_search
    from small_models import Case, randomise
    from zoo.classic_control.cartpole.config import cartpole_unizero_config as cartpole
    from zoo.classic_control.cartpole.envs.cartpole_lightzero_env import gym
torch.set_num_threads(1)


def digest(*data):
    return hashlib.sha256(b''.join(data)).hexdigest()


def train(folder, names, flag):
    os.mkdir(folder)
    os.chdir(folder)
    main, create = copy.deepcopy(cartpole.main_config), copy.deepcopy(cartpole.create_config)
    main.exp_name = 'training'
    main.env.update(collector_env_num=3, evaluator_env_num=3, n_evaluator_episode=3)
    main.policy.update(
        cuda=False, num_simulations=5, batch_size=8, collector_env_num=3, evaluator_env_num=3, n_episode=3,
        update_per_collect=2, reanalyze_ratio=0.25, eval_freq=5, game_segment_length=20
    )
    main.policy.model.world_model_cfg.update(
        device='cpu', embed_dim=32, env_num=3, rotary_emb=False, **flag
    )
    create.env_manager.type = 'base'
    create.policy.import_names = names
    import_module(names)
    states = []

    class Model(MODEL_REGISTRY.get('UniZeroModel')):
        # A fresh model's predictions are all the same; and the random state after its construction is looked at.
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            states.append(torch.get_rng_state().numpy().tobytes())
            randomise(self, Case(), 5)

    MODEL_REGISTRY.register('UniZeroModel', Model, force_overwrite=True)
    # LightZero's CartPole never looks at the seed that it is given.
    environments = itertools.count()
    np_random = gym.utils.seeding.np_random
    gym.utils.seeding.np_random = lambda seed=None: np_random(next(environments) if seed is None else seed)
    with seeded_search():
        policy = train_unizero([main, create], seed=0, max_env_step=40)
    world_model = policy._model.world_model
    return dict(
        plugin='lzero_kvcache' in sys.modules,
        world_model=type(world_model).__module__,
        constructed=digest(*states),
        model=digest(*(value.numpy().tobytes() for value in policy._model.state_dict().values())),
        target=digest(*(value.numpy().tobytes() for value in policy._target_model.state_dict().values())),
        torch=digest(torch.get_rng_state().numpy().tobytes()),
        numpy=digest(repr(np.random.get_state()[1:]).encode(), np.random.get_state()[1].tobytes()),
        python=digest(repr(random.getstate()).encode()),
        queries=[world_model.root_total_query_cnt, world_model.root_hit_cnt, world_model.total_query_count],
    )

"""
FORKS = TRAINING + """
import ding.utils.segment_tree as segment_tree
assert 'lzero_kvcache' not in sys.modules
print(json.dumps(dict(in_forks({
    'without': lambda: train('without', ['lzero.policy.unizero'], {}),
    'with': lambda: train('with', ['lzero.policy.unizero', 'lzero_kvcache'], {'use_new_cache_manager': False}),
}), segment_tree=type(segment_tree._setitem).__name__)))
"""
WITHOUT_NUMBA = """
import sys
sys.modules['numba'] = None
""" + TRAINING + """
import ding.utils.segment_tree as segment_tree
results = train('alone', ['lzero.policy.unizero', 'lzero_kvcache'], {'use_new_cache_manager': False})
print(json.dumps(dict(alone=results, segment_tree=type(segment_tree._setitem).__name__)))
"""


@pytest.fixture(scope='module')
def trainings(tmp_path_factory):
    """What each program prints in the end; they run at once."""
    root = Path(lzero_kvcache.__file__).resolve().parent.parent
    folders = root, Path(__file__).resolve().parent
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', program], cwd=str(tmp_path_factory.mktemp('training')), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
            env=environment(*folders, OMP_NUM_THREADS='1', WANDB_MODE='disabled')
        ) for program in (FORKS, WITHOUT_NUMBA)
    ]
    results = []
    for process in processes:
        out, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors[-3000:]
        results.append(json.loads(out.splitlines()[-1]))
    return results


def test_a_training_with_and_without_the_plugin(trainings):
    """Collection, evaluation, reanalysis and updates: the same weights in the end, the same random numbers drawn."""
    results = [dict(trainings[0][name]) for name in ('without', 'with')]
    for result in results:
        assert 'error' not in result, result['error']
    assert [result.pop('plugin') for result in results] == [False, True]
    assert [result.pop('world_model').split('.')[0] for result in results] == ['lzero', 'lzero_kvcache']
    assert results[0] == results[1]
    assert results[0]['queries'][2] > 100  # so many rows were expanded


@pytest.mark.skipif(importlib.util.find_spec('numba') is None, reason='needs numba')
def test_a_training_with_and_without_numba(trainings):
    """DI-engine compiles its segment tree where numba can be imported; LightZero does not ask it."""
    beside, alone = trainings
    assert (beside['segment_tree'], alone['segment_tree']) == ('CPUDispatcher', 'partial')
    assert beside['with'] == alone['alone']
