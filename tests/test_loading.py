"""How the plugin gets into a run: import names in any order, ``enable`` and ``disable``, and checks beforehand."""
import contextlib
import copy
import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import lzero.entry
import pytest
from builders import compiled, small_cartpole
from ding.policy import create_policy
from easydict import EasyDict
from forks import environment
from small_models import ON_MAIN, adapter
from zoo.classic_control.cartpole.config import cartpole_unizero_config as cartpole

import lzero_kvcache
from lzero_kvcache import ConfigError, KVCacheManager, OldCacheManager, check_config, disable, enable
from lzero_kvcache.host import building, root_level

ROOT = Path(lzero_kvcache.__file__).resolve().parent.parent

IMPORTS = """
import importlib, json, logging, os, sys
from functools import partial
import torch, scipy.stats
from forks import in_forks

OF_LIGHTZERO = ['lzero.policy.unizero', 'lzero.policy.sampled_unizero', 'lzero.entry', 'lzero.model.unizero_model']


def imported(*names):
    import ding.policy, ding.worker
    from ding.utils import MODEL_REGISTRY, POLICY_REGISTRY, import_module
    from ding.worker.learner.learner_hook import hook_mapping
    import_module(names)
    once = {name: POLICY_REGISTRY.get(name) for name in POLICY_REGISTRY}
    import_module(names)
    import_module(names[::-1])
    import lzero_kvcache
    importlib.reload(lzero_kvcache)
    from lzero_kvcache.training import load_config
    config = load_config('config_new')
    importlib.reload(lzero_kvcache.host.policies)  # as notebooks do with a module that was edited
    lzero_kvcache.check_config(config.main_config, config.create_config)
    for name in [name for name in sys.modules if name.split('.')[0] == 'lzero_kvcache']:
        del sys.modules[name]
    import lzero_kvcache
    return dict(
        same=all(POLICY_REGISTRY.get(name).__qualname__ == cls.__qualname__ for name, cls in once.items()),
        policies={name: POLICY_REGISTRY.get(name).__module__ for name in ('unizero', 'sampled_unizero', 'muzero')},
        models={name: MODEL_REGISTRY.get(name).__module__ for name in ('UniZeroModel', 'SampledUniZeroModel')},
        managers=sorted(lzero_kvcache.KV_CACHE_REGISTRY),
        hook=hook_mapping['kv_cache_stats'].__module__,
    )


def said_by(*names):
    # The lines that imports print, and what becomes of the root logger's level.
    with open(f'said_{os.getpid()}', 'w+') as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        levels = []
        for name in names:
            before = logging.getLogger().level
            importlib.import_module(name)
            if name == 'lzero_kvcache':
                levels = [before, logging.getLogger().level]
        sys.stdout.flush()
        said.seek(0)
        return dict(lines=sorted(said.read().splitlines()), levels=levels)


ORDERS = [OF_LIGHTZERO[:n] + ['lzero_kvcache'] + OF_LIGHTZERO[n:] for n in (0, 1, 4)]
ORDERS.append(['lzero.entry', 'lzero_kvcache', *OF_LIGHTZERO])
print(json.dumps(in_forks({
    'LightZero alone': partial(said_by, *OF_LIGHTZERO),
    **{'both, ' + ' '.join(order): partial(said_by, *order) for order in ORDERS},
    'LightZero first': lambda: imported('lzero.policy.unizero', 'lzero.policy.sampled_unizero', 'lzero_kvcache'),
    'plugin first': lambda: imported('lzero_kvcache', 'lzero.policy.sampled_unizero', 'lzero.policy.unizero'),
})))
"""


@pytest.fixture(scope='module')
def fresh_processes(tmp_path_factory):
    """What is registered and said in processes that import LightZero and the plugin in several orders."""
    folders = ROOT, Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, '-c', IMPORTS], env=environment(*folders, OMP_NUM_THREADS='1'), timeout=300,
        capture_output=True, text=True, check=False, cwd=str(tmp_path_factory.mktemp('imports'))
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('order', ['LightZero first', 'plugin first'])
def test_import_order(fresh_processes, order):
    """Once or several times, reloaded, and after it was forgotten; what the plugin does not serve stays LightZero's."""
    assert fresh_processes[order] == dict(
        same=True,
        policies=dict(
            unizero='lzero_kvcache.host.policies', sampled_unizero='lzero_kvcache.host.policies',
            muzero='lzero.policy.muzero'
        ),
        models=dict(UniZeroModel='lzero_kvcache.host.models', SampledUniZeroModel='lzero_kvcache.host.models'),
        managers=['lightzero', 'new', 'old'] if ON_MAIN else ['new', 'old'],
        hook='lzero_kvcache.telemetry',
    )


def test_an_import_says_nothing_and_leaves_the_level_of_logs(fresh_processes):
    alone = fresh_processes['LightZero alone']['lines']
    assert alone
    together = {name: said for name, said in fresh_processes.items() if name.startswith('both')}
    for name, said in together.items():
        assert said['lines'] == alone, name
        assert said['levels'][0] == said['levels'][1], name


def test_the_level_that_lightzero_sets_comes_with_the_first_model(monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, 'level', logging.ERROR)
    with root_level.kept():
        root.setLevel(logging.DEBUG)
    assert root.level == logging.ERROR
    building.try_policy(small_cartpole(new=True), copy.deepcopy(cartpole.create_config))
    assert root.level == logging.ERROR  # a policy that is only tried is none of a training
    policy = compiled(small_cartpole(new=True)).policy
    create_policy(policy, enable_field=list(adapter().POLICY_FIELDS))
    assert root.level == logging.DEBUG
    root.setLevel(logging.ERROR)
    create_policy(policy, enable_field=list(adapter().POLICY_FIELDS))
    assert root.level == logging.ERROR


def test_what_brings_the_plugin_along_may_print(tmp_path):
    """Under ``python -m``, too."""
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / '__init__.py').write_text('import lzero_kvcache')
    (tmp_path / 'mine' / 'main.py').write_text('')
    (tmp_path / 'lzero.py').write_text('print("said by LightZero", flush=True)\nraise SystemExit')
    done = subprocess.run([sys.executable, '-m', 'mine.main'], env=environment(tmp_path, ROOT), timeout=300,
                          capture_output=True, text=True, check=False)
    assert 'said by LightZero' in done.stdout


def cartpole_configs():
    """LightZero's own, as it is."""
    return copy.deepcopy(cartpole.main_config), copy.deepcopy(cartpole.create_config)


def atari_configs():
    """LightZero's own segment config, which hands its configs to the entry and keeps none."""
    from zoo.atari.config import atari_unizero_segment_config
    caught = []
    original = lzero.entry.train_unizero_segment
    lzero.entry.train_unizero_segment = lambda configs, **kwargs: caught.extend(configs)
    try:
        atari_unizero_segment_config.main('PongNoFrameskip-v4', 0)
    finally:
        lzero.entry.train_unizero_segment = original
    main_config, create_config = caught
    return copy.deepcopy(main_config), copy.deepcopy(create_config)


@pytest.fixture(params=[cartpole_configs, atari_configs], ids=['CartPole', 'Atari segment'])
def configs(request, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # LightZero's main branch makes the run's folder
    return request.param()


def cfg_of(main_config):
    return main_config.policy.model.world_model_cfg


class TestEnable:

    def test_one_line(self, configs):
        main_config, create_config = configs
        before = copy.deepcopy(configs)
        cfg_of(before[0]).pop('use_new_cache_manager', None)  # of LightZero's main branch
        enable(main_config, create_config)
        assert cfg_of(main_config).use_new_cache_manager is True
        assert create_config.policy.import_names == ['lzero.policy.unizero', 'lzero_kvcache']
        assert 'kv_cache_cfg' not in cfg_of(main_config)
        del cfg_of(main_config)['use_new_cache_manager']
        create_config.policy.import_names.remove('lzero_kvcache')
        assert (main_config, create_config) == before

    def test_options(self, configs):
        enable(*configs, eviction='lru', init_pool_size=7)
        assert cfg_of(configs[0]).kv_cache_cfg == dict(eviction='lru', init_pool_size=7)
        options = check_config(*configs)
        assert (options.use_new, options.eviction, options.init_pool_size) == (True, 'lru', 7)

    @pytest.mark.parametrize('names', [None, [], ['lzero_kvcache'], ('lzero.policy.unizero', ), ['a', 'lzero_kvcache']])
    def test_import_names(self, configs, names):
        if names is None:
            del configs[1].policy['import_names']
        else:
            configs[1].policy.import_names = names
        enable(*configs)
        expected = list(names or [])
        assert configs[1].policy.import_names == expected + ['lzero_kvcache'] * ('lzero_kvcache' not in expected)

    @pytest.mark.parametrize(('options', 'message'), [
        (dict(evicton='lru'), 'evicton'),
        (dict(eviction='newest'), 'newest'),
        (dict(init_pool_size=0), 'init_pool_size=0'),
        (dict(enable_stats='no'), 'enable_stats'),
        (dict(type='old'), "type='old'"),
        (dict(type='nobody'), 'nobody'),
        (dict(recurrent_pool_size=3), 'recurrent_pool_size=3'),
        (dict(eviction='lru', dtype='float64'), 'float64'),
    ])
    def test_a_wrong_option_changes_nothing(self, configs, options, message):
        before = copy.deepcopy(configs)
        with pytest.raises(ConfigError, match=message):
            enable(*configs, **options)
        assert configs == before

    @pytest.mark.parametrize(('kind', 'said'), [
        ('muzero', "served are 'unizero', 'sampled_unizero'"), ('sampled_muzero', "served are 'unizero', "),
        ('unizro', "did you mean 'unizero'?"), (None, "valid are 'unizero', "), (5, "valid are 'unizero', "),
    ])
    def test_another_policy(self, configs, kind, said):
        """The name of another algorithm is no misspelt one."""
        configs[1].policy.type = kind
        with pytest.raises(ConfigError) as caught:
            enable(*configs)
        assert str(caught.value).startswith(f'create_config.policy.type={kind!r} is not a UniZero policy: {said}')

    @pytest.mark.parametrize(('key', 'value'), [
        ('collector_env_num', None), ('collector_env_num', '8'), ('evaluator_env_num', 0), ('num_simulations', None),
        ('random_collect_episode_num', None), ('random_collect_episode_num', 'x'), ('mcts_ctree', None),
    ])
    def test_a_wrong_number_of_the_policy(self, configs, key, value):
        configs[0].policy[key] = value
        with pytest.raises(ConfigError, match=f'^policy.{key}={value!r} '):
            enable(*configs)


@pytest.mark.parametrize('switch', [enable, disable])
@pytest.mark.parametrize('place', [0, 1])
@pytest.mark.parametrize('policy', [{}, dict(policy=None)])
def test_a_config_without_a_policy(switch, place, policy):
    configs = [dict(policy={}), dict(policy={})]
    configs[place] = policy
    before = copy.deepcopy(configs)
    with pytest.raises(ConfigError, match=('main_config', 'create_config')[place] + '.policy=None must be a dict'):
        switch(*configs)
    assert configs == before


@pytest.mark.parametrize('switch', [enable, disable, check_config])
@pytest.mark.parametrize(('main', 'create', 'said'), [
    (5, None, 'main_config=5 must be a dict'), (None, None, 'main_config=None must be a dict'),
    (dict(policy={}), 'x', "create_config='x' must be a dict"), ({}, {}, 'main_config.policy=None must be a dict'),
    *((dict(policy=dict(model=wrong)), dict(policy={}), f'main_config.policy.model={wrong!r} must be a dict')
      for wrong in (None, 5)),
    *((dict(policy=dict(model=dict(world_model_cfg=wrong))), dict(policy={}),
       f'main_config.policy.model.world_model_cfg={wrong!r} must be a dict') for wrong in (None, [])),
    *((dict(policy={}), dict(policy=dict(type='unizero', import_names=wrong)),
       f'create_config.policy.import_names={wrong!r} must be a list of names of modules') for wrong in (5, [5])),
])
def test_configs_that_are_none(switch, main, create, said):
    with pytest.raises(ConfigError) as caught:
        switch(main, create)
    assert str(caught.value).startswith(said)


def test_options_that_are_no_dict_are_refused_as_in_a_file(configs):
    configs[0].policy.model.world_model_cfg.kv_cache_cfg = 3
    before = copy.deepcopy(configs)
    for options in ({}, dict(eviction='lru')):
        with pytest.raises(ConfigError, match='kv_cache_cfg=3 must be a dict of type, eviction, '):
            enable(*configs, **options)
        assert configs == before


class TestDisable:

    def test_turns_the_flag_off_and_keeps_the_plugin(self, configs):
        """So that both systems write the same tags."""
        enable(*configs, eviction='lru')
        disable(*configs)
        assert cfg_of(configs[0]).use_new_cache_manager is False
        assert configs[1].policy.import_names == ['lzero.policy.unizero', 'lzero_kvcache']
        assert check_config(*configs).use_new is False

    def test_and_back_with_the_options_of_before(self, configs):
        enable(*configs, eviction='lru')
        disable(*configs)
        enable(*configs)
        assert check_config(*configs).eviction == 'lru'


@pytest.mark.parametrize('new', [True, False], ids=['enabled', 'disabled'])
def test_an_enabled_config_trains_with_the_new_system(new):
    """LightZero's CartPole config through DI-engine's compilation to the policy."""
    main_config, create_config = cartpole_configs()
    main_config.policy.cuda, cfg_of(main_config).device, main_config.policy.device = False, 'cpu', 'cpu'
    enable(main_config, create_config)
    if not new:
        disable(main_config, create_config)
    config = compiled(main_config).policy
    with contextlib.redirect_stdout(io.StringIO()):
        policy = create_policy(config, enable_field=['learn', 'collect', 'eval'])
    world_model = policy._model.world_model
    assert world_model.use_new_cache_manager is new
    assert type(world_model.kv_cache_manager) is (KVCacheManager if new else OldCacheManager)
    if new:
        assert len(world_model.kv_cache_manager.init_pools) == 8
        assert world_model.kv_cache_manager.recur_pool.pool_size == 8 * adapter().simulations_of(config)


@pytest.mark.parametrize('names', ['lzero.policy.unizero', ['lzero.policy.unizero'], [], None])
@pytest.mark.parametrize('kind', [dict, EasyDict])
def test_enable_takes_whatever_a_config_is_made_of(kind, names):
    """Plain dicts, a name alone, and a config that leaves the world model to LightZero."""
    main = kind(env=dict(), policy=dict())
    create = kind(policy=dict(type='unizero', import_names=names))
    enable(main, create, eviction='lru')
    world_model_cfg = main['policy']['model']['world_model_cfg']
    assert (world_model_cfg['use_new_cache_manager'], world_model_cfg['kv_cache_cfg']['eviction']) == (True, 'lru')
    listed = [names] if isinstance(names, str) else names or []
    assert create['policy']['import_names'] == [*listed, 'lzero_kvcache']
    assert check_config(main, create).eviction == 'lru'
    disable(main, create)
    assert not check_config(main, create).use_new
