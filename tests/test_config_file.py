"""Finding and loading config files: what they declare is honoured, and loading one never starts a training."""
import copy
import importlib
import os
import re
import sys
from unittest.mock import Mock

import pytest
import zoo
from config_files import BODY, PROGRAM, in_main, writer
from ding.utils import ENV_REGISTRY
from small_models import ON_MAIN
from trainings import PROJECT_ROOT
from zoo.classic_control.cartpole.config import cartpole_unizero_config as lightzeros_cartpole

import lzero_kvcache_options
from lzero_kvcache import ConfigError, info
from lzero_kvcache.training import find_config, load_config, make_plan, run, runner


@pytest.fixture()
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return writer(tmp_path)


@pytest.mark.parametrize('name', ['config_new.py', 'config_new', 'atari_unizero_segment_config.py'])
def test_a_bare_name_is_found_in_the_project(name, write):
    path = find_config(name)
    assert os.path.isabs(path)
    assert path.startswith(PROJECT_ROOT)


def test_the_current_folder_comes_before_the_project(write):
    path = write('config_new.py')
    assert find_config('config_new') == path


def test_a_path_is_never_looked_for_elsewhere(write):
    path = write('configs/config_new.py')
    assert find_config('configs/config_new') == path
    assert find_config('config_new').startswith(PROJECT_ROOT)


def test_a_name_is_ours_before_it_is_lightzeros():
    """LightZero's own is found where LightZero is, and changes nothing of what it says of caching."""
    ours, own = load_config('cartpole_unizero_config'), load_config('lightzero:cartpole_unizero_config.py')
    assert ours.config == os.path.join(PROJECT_ROOT, 'zoo_configs', 'cartpole_unizero_config.py')
    assert own.config == os.path.realpath(lightzeros_cartpole.__file__)
    flags = [loaded.main_config.policy.model.world_model_cfg.get('use_new_cache_manager') for loaded in (ours, own)]
    assert flags == [True, None]


def test_a_name_that_lightzero_alone_has(tmp_path, monkeypatch):
    folder = tmp_path / 'zoo' / 'game' / 'config'
    folder.mkdir(parents=True)
    (folder / 'game_unizero_config.py').write_text('# unizero')
    (folder / 'game_muzero_config.py').write_text('# muzero')
    package = lzero_kvcache_options._package
    monkeypatch.setattr(lzero_kvcache_options, '_package', lambda name: tmp_path / 'lzero' if name == 'lzero'
                        else package(name))
    assert find_config('game_unizero_config') == str(folder / 'game_unizero_config.py')
    with pytest.raises(ConfigError, match="LightZero has no .* did you mean 'lightzero:game_unizero_config'"):
        find_config('lightzero:gmae_unizero_config')


@pytest.mark.parametrize(('name', 'advice'), [
    ('confg_old.py', "did you mean 'config_old'?"), ('cartpole', "did you mean 'cartpole_unizero_config'?"),
    ('config', "did you mean 'config_new' or 'config_old'?"),
    ('lightzero:cartpole', "did you mean 'lightzero:cartpole_unizero_config'?"),
    *((name, "give a path, or a name that 'lzero-kvcache zoo' lists") for name in (
        'lightzero:nothing', 'nothing_unizero_config', 'nope.py', 'lightzero:config_new', 'a', '')),
])
def test_an_unknown_name_gets_names_that_are_near_alone(name, advice, write):
    with pytest.raises(ConfigError) as caught:
        find_config(name)
    said = re.sub(r" or '\S+_ppo_config'", '', str(caught.value))  # LightZero's main branch has these, too
    assert said.startswith(f'--config {name}: ') and said.endswith('of this name; ' + advice) and len(said) < 200


def test_module_variables_are_honoured(write):
    loaded = load_config(write(rest="max_env_step = 2e5\nseed = 3\nentry = 'train_unizero_segment'\nthreads = 2"))
    assert (loaded.max_env_step, loaded.seed, loaded.entry, loaded.threads) == (
        200000, 3, 'train_unizero_segment', 2)
    assert isinstance(loaded.max_env_step, int)


def test_without_module_variables(write):
    loaded = load_config(write())
    assert (loaded.max_env_step, loaded.max_train_iter, loaded.seed) == (None, None, 0)


@pytest.mark.parametrize(('policy', 'run_as_a_script', 'entry'), [
    ('', '', 'train_unizero'),
    ('num_segments=8,', '', 'train_unizero_segment'),
    ('buffer_reanalyze_freq=1/50,', '', 'train_unizero_segment'),
    ('num_segments=8,', 'train_unizero([main_config, create_config], seed=0)', 'train_unizero'),
    ('', 'train_unizero_segment([main_config, create_config])', 'train_unizero_segment'),
    ('', 'lzero.entry.train_unizero_segment([main_config, create_config])  # train_unizero()', 'train_unizero_segment'),
    ('', 'from lzero.entry import train_unizero_segment as go; go([])', 'train_unizero_segment'),
    ('num_segments=8,', '(train_muzero if 0 else train_unizero)([])', 'train_unizero'),
    ('', 'train_mine([])', 'train_unizero'),
    ('num_segments=8,', 'import mine; mine.train_muzero([])', 'train_unizero_segment'),
    ('', 'from mine import train_muzero; train_muzero([])', 'train_unizero'),
    ('', 'def train_muzero(): pass\n    train_muzero()', 'train_unizero'),
])
def test_the_entry_is_told_from_the_config(policy, run_as_a_script, entry, write):
    rest = run_as_a_script and f"if __name__ == '__main__':\n    {run_as_a_script}"
    assert load_config(write(policy=policy, rest=rest)).entry == entry


def test_the_entry_may_be_the_function_itself(write):
    rest = 'from lzero.entry import train_unizero as entry'
    assert load_config(write(rest=rest, policy='num_segments=8,')).entry == 'train_unizero'


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(rest="entry = 'train_muzero'"), "entry is 'train_muzero', which is not run here: 'train_unizero' and "),
    (dict(rest='from lzero.entry import train_muzero as entry'), "entry is 'train_muzero', which is not run here"),
    (dict(rest='from lzero.entry import train_muzero\ntrain_muzero([main_config, create_config])'),
     'mine.py: it calls train_muzero, which is not run here'),
    (dict(rest='max_env_step = 0'), 'max_env_step = 0.*at least 1'),
    (dict(rest="max_env_step = 'all'"), "max_env_step = 'all' is not a whole number of at least 1"),
    (dict(rest='max_env_step = float("inf")'), 'inf is not a whole number'),
    (dict(rest='seed = -1'), 'seed = -1.*at least 0'),
    (dict(rest='del create_config'), 'no create_config'),
    (dict(rest='main_config = 3'), 'mine.py: main_config=3 must be a dict'),
    (dict(rest='del main_config["policy"]'), 'main_config.policy=None must be a dict'),
    (dict(rest='main_config["policy"]["model"] = dict()'), 'world_model_cfg=None must be a dict'),
    (dict(rest='main_config["policy"][3] = 4'), 'mine.py: .* must be string'),
    (dict(rest='import surely_not_here'), "mine.py:7: there is no module 'surely_not_here': put its .* PYTHONPATH"),
    (dict(rest='1 / 0'), 'mine.py:7: ZeroDivisionError'),
    (dict(rest='def ('), 'mine.py:7: SyntaxError'),
])
def test_what_is_wrong_is_said_in_one_line(kwargs, message, write):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(**kwargs))
    assert '\n' not in str(caught.value)


def test_loading_runs_nothing_under_main(write):
    load_config(write(rest="if __name__ == '__main__':\n    raise AssertionError('a training would start')"))


REGISTERS = '''
from ding.utils import ENV_REGISTRY
from lzero.entry import train_unizero
{rest}

@ENV_REGISTRY.register('surely_mine')
class Mine:
    pass
'''


@pytest.fixture()
def registered():
    yield ENV_REGISTRY
    ENV_REGISTRY.pop('surely_mine', None)


@pytest.mark.parametrize('as_a_program', [False, True])
def test_a_config_that_registers_its_environment_can_be_loaded_again(as_a_program, write, registered):
    config = BODY.format(policy='', type='unizero', rest='')
    if as_a_program:
        config = 'def main():\n' + in_main() + '    train_unizero([main_config, create_config])\n'
    path = write(body=REGISTERS + PROGRAM * as_a_program, rest=config)
    for _ in range(2):
        before = registered.get('surely_mine') if 'surely_mine' in registered else None
        assert load_config(path).entry == 'train_unizero'
        assert registered.get('surely_mine') is not before
    with pytest.raises(AssertionError, match='surely_mine'):  # out of a load, DI-engine's own rule holds
        registered.register('surely_mine', object)


def test_what_another_has_registered_is_not_replaced(write, registered):
    registered.register('surely_mine', Mock)
    with pytest.raises(ConfigError, match='AssertionError: surely_mine'):
        load_config(write(body=REGISTERS, rest=''))
    assert registered.get('surely_mine') is Mock


@pytest.mark.parametrize(('trains', 'entry'), [
    ('train_muzero([main_config, create_config])', 'train_muzero'),
    ('from lzero.entry import train_rezero as train; train([main_config, create_config])', 'train_rezero'),
    ('go = functools.partial(lzero.entry.train_muzero, seed=0); go([main_config, create_config])', 'train_muzero'),
    ('from lzero import entry as e; e.train_muzero([main_config, create_config])', 'train_muzero'),
    # of another LightZero
    ('from lzero.entry import train_unizero_in_future as train; train([main_config])', 'train_unizero_in_future'),
    ('lzero.entry.train_unizero_in_future([main_config])', 'train_unizero_in_future'),
])
def test_a_file_that_trains_another_as_a_program_is_refused(trains, entry, write):
    """It is not run as a program, since it declares its configs."""
    with pytest.raises(ConfigError, match=f"mine.py: it calls {entry}, which is not run here: 'train_unizero' and "):
        load_config(write(rest=f"if __name__ == '__main__':\n    {trains}"))


def test_a_neighbour_is_imported_afresh(write):
    write('a/neighbour.py', rest='seed = 1')
    write('b/neighbour.py', rest='seed = 2')
    first = write('a/mine.py', body='from neighbour import *')
    second = write('b/mine.py', body='from neighbour import *')
    assert [load_config(path).seed for path in (first, second)] == [1, 2]


def test_a_package_beside_it_is_imported_afresh(write):
    for folder, seed in (('a', 1), ('b', 2)):
        path = write(f'{folder}/mine.py', rest='from envs.numbers_of import seed')
        envs = os.path.join(os.path.dirname(path), 'envs')
        os.mkdir(envs)
        with open(os.path.join(envs, 'numbers_of.py'), 'w', encoding='utf-8') as file:
            file.write(f'seed = {seed}')
        assert load_config(path).seed == seed


def test_what_lies_beside_it_can_be_imported_until_another_is_loaded(write):
    path = write('a/mine.py')
    write('a/my_env.py', body='name = 5')
    load_config(path)
    assert importlib.import_module('my_env').name == 5
    load_config(path)
    load_config(write('b/mine.py'))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module('my_env')


@pytest.mark.parametrize('also_a_config', [False, True])
def test_a_plan_runs_with_what_lies_beside_its_config(also_a_config, write, monkeypatch, registered):
    path = write('a/mine.py', body='import my_env\n' + BODY)
    write('a/my_env.py', body=REGISTERS, rest='main_config = {}' if also_a_config else '')
    plan = load_config(path)
    mine, other, found = importlib.import_module('my_env'), write('b/mine.py'), []
    monkeypatch.setattr(runner, '_Training', lambda *_: found.append(importlib.import_module('my_env')) or Mock())
    monkeypatch.setattr(info, 'check_config', lambda *_: found.append(importlib.import_module('my_env')) or 1 / 0)
    load_config(other)
    run(plan, Mock(), Mock())
    load_config(other)
    with pytest.raises(ZeroDivisionError):
        info.of_plan(plan)
    assert found == [mine, mine]  # which was not executed again


@pytest.mark.parametrize('imported_before', [False, True])
def test_a_config_that_others_change_is_read_anew(write, monkeypatch, imported_before):
    monkeypatch.syspath_prepend(os.path.dirname(write('elsewhere/base.py')))
    monkeypatch.setitem(sys.modules, 'cannot_be_imported', None)
    if imported_before:
        importlib.import_module('base').main_config['exp_name'] = 'wrong'
    changed = "from base import create_config, main_config\nmain_config['exp_name'] += '_changed'"
    write('a/base.py')
    for name in ('a/first.py', 'a/second.py'):
        assert load_config(write(name, body=changed)).main_config.exp_name == 'data/x_seed0_changed'


def test_changing_what_was_loaded_changes_no_module():
    loaded = load_config('cartpole_unizero_config.py')
    original = importlib.import_module('zoo.classic_control.cartpole.config.cartpole_unizero_config')
    loaded.main_config.policy.num_simulations = -1
    assert original.main_config.policy.num_simulations != -1


def test_the_two_configs_differ_in_the_flag_alone():
    old, new = load_config('config_old'), load_config('config_new')
    assert new.main_config.policy.model.world_model_cfg.use_new_cache_manager is True
    assert old.main_config.policy.model.world_model_cfg.use_new_cache_manager is False
    assert new.main_config.exp_name != old.main_config.exp_name
    same = copy.deepcopy(old)
    same.config, same.main_config.exp_name = new.config, new.main_config.exp_name
    same.main_config.policy.model.world_model_cfg.use_new_cache_manager = True
    assert same == new


def test_lightzeros_own_files_load_as_they_are():
    from zoo.atari.config import atari_unizero_segment_config as atari
    from zoo.classic_control.cartpole.config import cartpole_unizero_config as cartpole
    assert load_config(cartpole.__file__).max_env_step == 200000
    loaded = load_config(atari.__file__)
    assert (loaded.entry, loaded.max_env_step, loaded.main_config.env.env_id) == (
        'train_unizero_segment', *((1000000, 'ALE/Pong-v5') if ON_MAIN else (500000, 'PongNoFrameskip-v4')))


def test_a_folder_zoo_of_the_users_own(write, tmp_path):
    """LightZero's package has the name; its path can be added to, as the error says."""
    (tmp_path / 'zoo').mkdir()
    (tmp_path / 'zoo' / 'mygame.py').write_text('')
    with pytest.raises(ConfigError, match="'zoo.mygame' below the zoo that is installed, .*/zoo; "
                                          "if it is in a folder zoo of yours, write in the config: (.*)") as caught:
        load_config(write(rest='import zoo.mygame'))
    advice = str(caught.value).rpartition('config: ')[2].replace('PATH/TO', str(tmp_path))
    before = list(zoo.__path__)
    try:
        load_config(write(rest=advice + '\nimport zoo.mygame'))
    finally:
        zoo.__path__[:] = before
        sys.modules.pop('zoo.mygame', None)


@pytest.mark.parametrize('kind', ["'unizer'", "'muzero'", 'None'])
def test_a_policy_that_is_not_served_is_refused_before_it_is_built(kind, tmp_path):
    (tmp_path / 'config.py').write_text(
        'import copy\nfrom zoo.classic_control.cartpole.config import cartpole_unizero_config as theirs\n'
        'main_config, create_config = theirs.main_config, copy.deepcopy(theirs.create_config)\n'
        f'create_config.policy.type = {kind}\n'
    )
    with pytest.raises(ConfigError, match='create_config.policy.type=.* is not a UniZero policy'):
        make_plan(str(tmp_path / 'config.py'))


def test_a_config_of_another_algorithm_is_told_so_before_what_it_lacks():
    with pytest.raises(ConfigError, match="^create_config.policy.type='muzero' is not a UniZero policy: served are "):
        make_plan(lightzeros_cartpole.__file__.replace('unizero', 'muzero'))
