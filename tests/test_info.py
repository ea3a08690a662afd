"""``python -m lzero_kvcache info``: each line against the manager of a policy that is built and used."""
import os
import sys

import pytest
import torch
from builders import Worker, make_policy
from lzero.model.unizero_world_models import transformer
from test_manager import PlainManager
from trainings import trained

from lzero_kvcache import __version__, info
from lzero_kvcache.cli import commands
from lzero_kvcache.config import KV_CACHE_CFG
from lzero_kvcache.engine.slab import MIB
from lzero_kvcache.host import building
from lzero_kvcache.host.lightzero import adapter_of, lightzero
from lzero_kvcache.training import make_plan
from lzero_kvcache_options import lightzero_configs, main, our_configs

WM = 'policy.model.world_model_cfg.'
SMALL = ['policy.num_simulations=6', 'env.collector_env_num=3', 'env.evaluator_env_num=2',
         WM + 'context_length=6', WM + 'env_num=3']


def tables(*assignments):
    return info.of_plan(make_plan('config_new', overrides=[*SMALL, *assignments]))


def cache_rows(*assignments):
    rows = tables(*assignments)['cache']
    assert len(dict(rows)) == len(rows)
    return dict(rows)


@pytest.fixture(scope='module')
def new():
    """What info says of a config, and the world model that collects with that config, after some steps."""
    rows = cache_rows(WM + 'kv_cache_cfg.init_pool_size=7', WM + 'kv_cache_cfg.eviction=lru',
                      WM + 'kv_cache_cfg.dtype=bfloat16')
    policy = make_policy(True, simulations=6, context_length=6, embed_dim=64, game_segment_length=50,
                         kv_cache_cfg=dict(init_pool_size=7, eviction='lru', dtype='bfloat16'))
    Worker(policy).step([0, 1, 2])
    Worker(policy, 'eval').step([0, 1])
    return rows, policy._model.world_model


class TestNew:

    def test_pools(self, new):
        rows, world_model = new
        manager = world_model.kv_cache_manager
        assert rows['cache system'] == "new, with manager 'new'"
        sizes = {pool.pool_size for pool in manager.init_pools}
        assert rows['init pools'] == f'{len(manager.init_pools)} x {sizes.pop()} contexts'
        assert rows['init pools'].startswith('3 x 7 contexts')
        sizes = {pool.pool_size for pool in manager.eval_pools}
        assert rows['init pools of evaluation'] == f'{len(manager.eval_pools)} x {sizes.pop()} contexts'
        assert rows['newest roots'] == '3 + 2 contexts'
        assert rows['search'] == "in LightZero's tree: pages are kept as torch.bfloat16"
        assert rows['recurrent pool'] == f'{manager.recur_pool.pool_size} contexts' == '18 contexts'
        assert rows['working batch'] == f'{manager.wm_pool.pool_size} contexts'

    def test_pages_and_memory_are_those_of_the_first_use(self, new):
        rows, world_model = new
        manager = world_model.kv_cache_manager
        data = manager.store.slab.data
        page_bytes = data[0].numel() * data.element_size()
        assert rows['pages'] == f'{data.shape[0]:,} of {page_bytes:,} bytes, bfloat16'
        assert rows['pages of a context'] == '2 at the most'
        assert rows['memory of pages'].startswith(f'{data.shape[0] * page_bytes / MIB:,.2f} MiB, ')
        assert rows['memory now'] == '0.00 MiB'
        assert rows['context'] == f'{world_model.context_length} tokens'

    def test_backend_and_device(self, new):
        rows, _ = new
        assert rows['device'] == ('cuda' if torch.cuda.is_available() else 'cpu')
        assert rows['backend'] in ('eager', 'cudagraph')

    def test_the_old_system_beside_it(self, new):
        assert new[0]['memory of the old system'] == cache_rows(WM + 'use_new_cache_manager=False')[
            'memory at the most']


def test_every_option_is_said_as_it_is_read_and_as_the_page_of_options_says_it():
    given = tables(WM + 'kv_cache_cfg.eviction=lru', WM + 'kv_cache_cfg.max_memory_mb=1')['kv_cache_cfg']
    assert {key: meaning for key, _, meaning in given} == {key: each.meaning for key, each in KV_CACHE_CFG.items()}
    values = {key: value for key, value, _ in given}
    assert (values['eviction'], values['max_memory_mb'], values['recurrent_pool_size']) == ("'lru'", '1.0', '18')
    assert 'kv_cache_cfg' not in tables(WM + 'use_new_cache_manager=False')


def test_a_bound_of_memory():
    rows = cache_rows(WM + 'kv_cache_cfg.max_memory_mb=0.25', WM + 'kv_cache_cfg.backend=eager')
    assert float(rows['memory of pages'].split()[0]) <= 0.25
    assert rows['backend'] == 'eager'


def test_a_manager_of_ones_own_need_not_keep_the_store(registered):

    class Mine(PlainManager):

        def use_store(self, store):
            pass

        def counters(self):
            return {'memory_mb': 0.}

    registered('mine', Mine)
    rows = cache_rows(WM + 'kv_cache_cfg.type=mine')
    assert rows['cache system'] == "new, with manager 'mine'" and rows['pages'].startswith('2,000 of ')


def test_the_old_system_fills_its_slots():
    """What is said to be the most is what LightZero has allocated once every slot of its pools was used."""
    rows = cache_rows(WM + 'use_new_cache_manager=False')
    policy = make_policy(False, simulations=6, context_length=6, embed_dim=64, num_simulations=6)
    world_model = policy._model.world_model
    manager = world_model.kv_cache_manager
    assert rows['cache system'] == 'old'
    assert rows['memory now'] == f'{manager.memory_mb:,.2f} MiB'
    worker, slots = Worker(policy), len(world_model.shared_pool_init_infer[0])
    for _ in range(slots + 1):
        worker.step([0, 1, 2])
    pools = [world_model.shared_pool_recur_infer, world_model.shared_pool_wm, *world_model.shared_pool_init_infer]
    assert all(slot is not None for pool in pools for slot in pool)
    assert manager.full_memory_mb == manager.memory_mb
    assert rows['memory at the most'] == f'{manager.memory_mb:,.2f} MiB, once every slot was used'
    assert rows['init pools'] == f'{len(world_model.shared_pool_init_infer)} x {slots} contexts'
    assert rows['recurrent pool'] == f'{len(world_model.shared_pool_recur_infer)} contexts'


def test_what_the_new_system_would_refuse_is_told_of_the_old_one():
    old = WM + 'use_new_cache_manager=False'
    rows = cache_rows(old, WM + 'kv_cache_cfg.eviction=lur', WM + 'kv_cache_cfg.init_pool_size=0')
    assert rows['cache system'] == 'old'
    assert rows['with the flag on'] == f"refused: {WM}kv_cache_cfg.eviction='lur' is unknown: did you mean 'lru'?"
    assert 'with the flag on' not in cache_rows(old)
    for wrong in ('kv_cache_cfg.max_memory_mb=0.0001', 'tokens_per_block=3'):  # which the model finds
        assert cache_rows(old, WM + wrong)['with the flag on'].startswith(f'refused: {WM}{wrong}')


@pytest.mark.parametrize('key', ['env_num', 'num_simulations'])
def test_what_the_old_system_would_refuse_is_told_of_the_new_one(key):
    rows = cache_rows(f'{WM}use_new_cache_manager=True', f'+{WM}{key}=None')
    assert rows['memory of the old system'].startswith(f'refused: {WM}{key}=None must be a')


def test_what_is_installed():
    rows = dict(info.installed())
    assert rows['lzero_kvcache'] == __version__
    assert rows['torch'] == torch.__version__
    assert rows["backend 'auto'"] == ('cudagraph' if torch.cuda.is_available() else 'eager')
    assert f'{lightzero.NAME}: {lightzero.SIGN}' in rows['LightZero']


def test_lightzeros_are_told_apart_by_what_they_have():
    class Release:
        def __init__(self):
            self.mlp = None

    class Main:
        def __init__(self):
            self.feed_forward = None

    release, main = map(adapter_of, (Release, Main))
    assert (release.NAME, main.NAME) == ('released 0.2.0', 'main branch')
    assert {name for name in vars(type(main)) if name[0] != '_'} <= set(vars(type(release)))
    with pytest.raises(ImportError, match='no mlp and no feed_forward'):
        adapter_of(type('Other', (), {'__init__': lambda self: None}))


def test_a_lightzero_that_is_not_known_is_refused_in_one_line(tmp_path):
    def prepare():
        transformer.Block = type('Block', (), {'__init__': lambda self: None})
        for name in [name for name in sys.modules if name.partition('.')[0] == 'lzero_kvcache']:
            del sys.modules[name]

    (code, said), = trained(tmp_path, ['--config', 'config_old'], prepare)
    assert code == 2, said
    lines = [line for line in said.splitlines() if 'error' in line]
    assert len(lines) == 1 and 'neither its release 0.2.0 nor its main branch' in lines[0]
    assert 'Traceback' not in said


def test_the_command_prints_its_tables_and_nothing_else(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['info', '--config', 'config_new', '--set', *SMALL]) == 0
    captured = capfd.readouterr()
    assert captured.err == ''
    around = [line.strip() for line in captured.out.split('\n') if line and line[0] not in '│┌├└']
    assert around == [f"Config: {our_configs()['config_new']}", 'installed', 'cache', 'kv_cache_cfg']
    assert list(tmp_path.iterdir()) == []


def test_options_that_the_old_system_does_not_read_are_told_of(caplog):
    """By info, and by the log of every model."""
    assert 'not read' not in dict(info.of_plan(make_plan('config_old', overrides=SMALL))['cache'])
    assert 'does not read' not in caplog.text
    unread = ['+policy.model.world_model_cfg.kv_cache_cfg.validation=exact']
    assert dict(info.of_plan(make_plan('config_old', overrides=[*SMALL, *unread]))['cache'])['not read'] == (
        "kv_cache_cfg.validation='exact'")
    assert "LightZero's own caching does not read kv_cache_cfg.validation='exact': only the new" in caplog.text


def test_a_config_is_shown_with_another_system(capfd):
    for cache, told in (('old', False), ('new', True)):
        assert main(['info', '--config', 'config_new', '--cache', cache, '--set', *SMALL]) == 0
        assert ('memory of pages' in capfd.readouterr().out) is told


@pytest.mark.parametrize(('columns', 'width'), [(None, 100), ('70', 70), ('140', 140)])
def test_a_pipe_is_as_wide_as_columns_says(columns, width, capfd, monkeypatch):
    monkeypatch.delenv('COLUMNS', raising=False)
    if columns:
        monkeypatch.setenv('COLUMNS', columns)
    assert commands.console().width == width
    monkeypatch.setattr(commands, 'of_zoo', lambda: [('config', 'a word and ' * 30)])
    assert main(['zoo']) == 0
    assert max(map(len, capfd.readouterr().out.split('\n'))) == width


def test_the_zoo_is_tried(monkeypatch):
    """One of ours, one of LightZero's, and one of each whose environment, or whose file, lacks something."""
    ours = {name: path for name, path in our_configs().items() if name in ('memory_unizero_config', 'config_new')}
    own = {name: path for name, path in lightzero_configs().items() if 'stack4' in name or 'memory' in name}
    monkeypatch.setattr(info, 'our_configs', lambda: ours)
    monkeypatch.setattr(info, 'lightzero_configs', lambda: own)
    try_environment = building.try_environment

    def without_pycolab(main_config, create_config):
        if 'memory' in create_config.env.type:
            raise ModuleNotFoundError(name='pycolab')
        try_environment(main_config, create_config)

    monkeypatch.setattr(building, 'try_environment', without_pycolab)
    rows = dict(info.of_zoo())
    missing = "extra memory: the module 'pycolab' is not installed; pip install 'pycolab==1.2'"
    assert 'ImportError: cannot import name' in rows.pop('lightzero:atari_unizero_stack4_config')
    assert rows == {'config_new': 'no extra: installed', 'memory_unizero_config': missing,
                    'lightzero:memory_unizero_config': missing}


def test_the_zoo_says_the_extra_of_a_config_that_cannot_be_loaded(monkeypatch):
    """As the Atari files without OpenCV, which they import."""
    name = 'atari_unizero_config'
    monkeypatch.setattr(info, 'our_configs', lambda: {name: our_configs()[name]})
    monkeypatch.setattr(info, 'lightzero_configs', lambda: {'lightzero:' + name: '', 'lightzero:theirs_config': ''})

    def make_plan(path):
        raise ModuleNotFoundError(name='cv2')

    monkeypatch.setattr(info, 'make_plan', make_plan)
    missing = "the module 'cv2' is not installed; pip install 'opencv-python-headless<4.11'"
    assert dict(info.of_zoo()) == {name: f'extra atari: {missing}', 'lightzero:' + name: f'extra atari: {missing}',
                                   'lightzero:theirs_config': f'unknown: {missing}'}


def test_a_data_parallel_config_is_told_of_in_one_process():
    plan = make_plan('atari_unizero_ddp_config', overrides=[WM + 'embed_dim=32', WM + 'num_layers=1'])
    assert dict(info.of_plan(plan)['cache'])['cache system'] == "new, with manager 'new'"


@pytest.mark.parametrize(('body', 'error'), [
    ('return self.no_such_range', 'AttributeError'), ('raise ValueError("two\\nlines")', 'ValueError: two lines')])
def test_an_environment_of_the_zoo_that_fails_is_named(monkeypatch, body, error):
    monkeypatch.setattr(info, 'our_configs', lambda: {'config_new': our_configs()['config_new']})
    monkeypatch.setattr(info, 'lightzero_configs', dict)
    place, fails = os.path.join(building.zoo_folder(), 'some_env.py'), {}
    exec(compile(f'def reset(self):\n    {body}', place, 'exec'), fails)
    monkeypatch.setattr('zoo.classic_control.cartpole.envs.cartpole_lightzero_env.CartPoleEnv.reset', fails['reset'])
    said = dict(info.of_zoo())['config_new']
    assert said.startswith(f"no extra: LightZero's own {place}:2 fails: {error}")
