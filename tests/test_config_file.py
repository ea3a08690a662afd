"""Finding and loading config files: what they declare is honoured, and loading one never starts a training."""
import copy
import importlib
import os
import sys
import textwrap
import traceback
from unittest import mock
from unittest.mock import Mock

import lzero.entry
import pytest
import zoo
from ding.utils import ENV_REGISTRY
from easydict import EasyDict
from small_models import ON_MAIN
from trainings import PROJECT_ROOT
from zoo.classic_control.cartpole.config import cartpole_unizero_config as lightzeros_cartpole

import lzero_kvcache_options
from lzero_kvcache import ConfigError
from lzero_kvcache.host.patches import ENTRIES
from lzero_kvcache.training import capture_entry_call, find_config, load_config, make_plan

PROGRAM = "\nif __name__ == '__main__':\n    main()\n"
BODY = """
main_config = dict(
    exp_name='data/x_seed0', env=dict(),
    policy=dict({policy} model=dict(world_model_cfg=dict(device='cpu'))),
)
create_config = dict(env=dict(type='e'), env_manager=dict(type='base'), policy=dict(type={type!r}))
{rest}
"""


@pytest.fixture()
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_config(name='mine.py', policy='', type='unizero', rest='', body=BODY):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(body.format(policy=policy, type=type, rest=rest))
        return str(path)

    return write_config


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
    with pytest.raises(ConfigError, match="did you mean 'lightzero:game_unizero_config'"):
        find_config('lightzero:game_muzero_config')


def test_an_unknown_name_gets_the_nearest_one(write):
    with pytest.raises(ConfigError, match="did you mean 'config_old'"):
        find_config('confg_old.py')


def test_a_name_near_to_none_gets_them_all(write):
    with pytest.raises(ConfigError, match='config_new, config_old') as caught:
        find_config('qqqqqqqqqqqq')
    assert '\n' not in str(caught.value)


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
])
def test_the_entry_is_told_from_the_config(policy, run_as_a_script, entry, write):
    rest = run_as_a_script and f"if __name__ == '__main__':\n    {run_as_a_script}"
    assert load_config(write(policy=policy, rest=rest)).entry == entry


def test_the_entry_may_be_the_function_itself(write):
    rest = 'from lzero.entry import train_unizero as entry'
    assert load_config(write(rest=rest, policy='num_segments=8,')).entry == 'train_unizero'


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(rest="entry = 'train_muzero'"), "'train_muzero'.*'train_unizero'"),
    (dict(rest='max_env_step = 0'), 'max_env_step = 0.*at least 1'),
    (dict(rest="max_env_step = 'all'"), "max_env_step = 'all' is not a whole number of at least 1"),
    (dict(rest='max_env_step = float("inf")'), 'inf is not a whole number'),
    (dict(rest='seed = -1'), 'seed = -1.*at least 0'),
    (dict(rest='del create_config'), 'no create_config'),
    (dict(rest='main_config = 3'), 'main_config is a int'),
    (dict(rest='del main_config["policy"]'), 'main_config.policy is missing'),
    (dict(rest='main_config["policy"]["model"] = dict()'), 'world_model_cfg is missing'),
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
        config = 'def main():\n' + textwrap.indent(config, '    ') + '    train_unizero([main_config, create_config])\n'
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
])
def test_a_file_that_trains_another_as_a_program_is_refused(trains, entry, write):
    """It is not run as a program, since it declares its configs."""
    with pytest.raises(ConfigError, match=f"entry = '{entry}'; it can be 'train_unizero' or 'train_unizero_segment'$"):
        load_config(write(rest=f"if __name__ == '__main__':\n    {trains}"))


@pytest.mark.parametrize('guarded', [False, True])
def test_another_training_is_refused_and_does_not_start(guarded, write):
    config = textwrap.indent(BODY.format(policy='cuda=False, device="cpu",', type='muzero', rest=''), '    ')
    rest = (
        'from easydict import EasyDict\nfrom lzero.entry import train_muzero\ndef main():\n{rest}\n'
        '    train_muzero([EasyDict(main_config), EasyDict(create_config)], seed=0)\n'
    )
    path = write(body=rest + (PROGRAM if guarded else 'main()'), rest=config)
    with pytest.raises(ConfigError, match="entry = 'train_muzero'; it can be 'train_unizero'"):
        load_config(path)
    assert os.listdir(os.path.dirname(path)) == ['mine.py']


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


def test_what_lies_beside_it_can_be_imported_inside_main(write):
    write('a/my_env.py', body='seed = 5')
    main = (
        'def main(seed):\n    from lzero.entry import train_unizero\n    import my_env\n{rest}\n'
        '    train_unizero([main_config, create_config], seed=my_env.seed)'
    )
    config = textwrap.indent(BODY.format(policy='', type='unizero', rest=''), '    ')
    path = write('a/mine.py', body=main + PROGRAM.replace('main()', 'main(0)'), rest=config)
    assert load_config(path).seed == 5


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


def test_a_program_has_the_defaults_of_its_own_command_line(write):
    config = textwrap.indent(BODY.format(policy='', type='unizero', rest=''), '    ')
    path = write('a/mine.py', body=f"""
import argparse
import lzero.entry
def main(env_id, seed):
{config}
    main_config['env']['env_id'] = env_id
    lzero.entry.train_unizero([main_config, create_config], seed=seed)
if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--env', default='cartpole-swingup')
    parser.add_argument('--seed', type=int, default=7)
    arguments = parser.parse_args()
    main(arguments.env, arguments.seed)
""")
    loaded = load_config(path)
    assert (loaded.main_config.env.env_id, loaded.seed) == ('cartpole-swingup', 7)


def test_a_program_that_needs_more_than_is_known(write):
    body = 'import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument("colour")\nparser.parse_args()'
    with pytest.raises(ConfigError, match='it ends the program .2. before it trains'):
        load_config(write(body=body + PROGRAM))


def test_capturing_a_call_puts_the_entries_back():
    before = [getattr(lzero.entry, name) for name in ENTRIES]

    def main():
        lzero.entry.train_unizero([dict(a=1), dict(b=2)], seed=5)
        raise AssertionError('the call must not return')

    call = capture_entry_call(main)
    assert call == dict(main_config=dict(a=1), create_config=dict(b=2), entry='train_unizero', seed=5)
    assert [getattr(lzero.entry, name) for name in ENTRIES] == before


def test_a_main_prints_no_traceback_of_the_call_that_is_captured(capsys):

    def main():
        print('begins')
        try:
            lzero.entry.train_unizero([dict(a=1), dict(b=2)])
        except BaseException:
            traceback.print_exc()
            raise

    assert capture_entry_call(main)['entry'] == 'train_unizero'
    assert capsys.readouterr() == ('begins\n', '')


@pytest.mark.parametrize(('top', 'inside'), [
    ('from lzero.entry import train_unizero as train', 'train'),
    ('import launcher', 'launcher.go'),
    ('', 'from lzero.entry.train_unizero import train_unizero; train_unizero'),
    ('', 'import late_launcher; late_launcher.go'),
    ('import functools, lzero.entry as e; go = functools.partial(e.train_unizero)', 'go'),
    ('import lzero.entry as e; go = dict(go=e.train_unizero)', 'go["go"]'),
])
def test_loading_trains_nothing_by_whatever_way_main_reaches_an_entry(top, inside, write):
    for name in ('launcher', 'late_launcher'):
        write(f'a/{name}.py', body='from lzero.entry import train_unizero as go')
    config = textwrap.indent(BODY.format(policy='', type='unizero', rest=''), '    ')
    trains = f'{inside}([main_config, create_config], seed=4)'
    path = write('a/mine.py', body=f'{top}\ndef main():\n{config}\n    {trains}' + PROGRAM)
    with mock.patch('ding.config.compile_config', side_effect=AssertionError('a training begins')):
        assert load_config(path).seed == 4
    assert importlib.import_module('launcher').go is lzero.entry.train_unizero
    assert importlib.import_module('late_launcher').go is lzero.entry.train_unizero


def test_loading_trains_nothing_where_a_decorated_main_or_the_file_itself_calls_an_entry(write):
    config = textwrap.indent(BODY.format(policy='', type='unizero', rest=''), '    ')
    main = f'@torch.enable_grad()\ndef main():\n{config}\n    train_unizero([main_config, create_config], seed=4)'
    decorated = write('a/mine.py', body='import torch\nfrom lzero.entry import train_unizero\n' + main + PROGRAM)
    call = 'import lzero.entry\nlzero.entry.train_unizero((main_config, create_config), 4)'
    unguarded = write('b/mine.py', rest=call)
    with mock.patch('ding.config.compile_config', side_effect=AssertionError('a training begins')):
        assert [load_config(path).seed for path in (decorated, unguarded)] == [4, 4]


@pytest.mark.parametrize(('does', 'said'), [
    ("raise ValueError('no such thing')", 'mine.py:3: ValueError: no such thing'),
    ('raise SystemExit(2)', 'it ends the program .2. before it trains'),
])
def test_what_goes_wrong_in_main_is_said_in_one_line(does, said, write):
    with pytest.raises(ConfigError, match=said):
        load_config(write(body=f'import os\ndef main():\n    {does}' + PROGRAM))


def test_capturing_from_a_function_that_trains_something_else():
    config = dict(policy=dict(cuda=False, device='cpu'))

    def main():
        lzero.entry.train_muzero([EasyDict(config), EasyDict(policy=dict(type='muzero'))])

    with pytest.raises(ConfigError, match=r"main\(\): entry = 'train_muzero'; it can be 'train_unizero'"):
        capture_entry_call(main)


def test_capturing_from_a_function_that_trains_nothing():
    with pytest.raises(ConfigError, match='calls none of train_unizero'):
        capture_entry_call(lambda: None)


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
