"""Config files that are run as programs: what they would have trained is captured, and no training starts."""
import importlib
import os
import traceback
from unittest import mock

import lzero.entry
import pytest
from config_files import PROGRAM, in_main, writer
from easydict import EasyDict

from lzero_kvcache import ConfigError
from lzero_kvcache.host.patches import ENTRIES
from lzero_kvcache.training import capture_entry_call, load_config


@pytest.fixture()
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return writer(tmp_path)


@pytest.mark.parametrize('kind', ['muzero', 'unizero'])  # of which LightZero's own assertion speaks
@pytest.mark.parametrize('guarded', [False, True])
def test_another_training_is_refused_and_does_not_start(guarded, kind, write):
    config = in_main('cuda=False, device="cpu",', kind)
    rest = (
        'from easydict import EasyDict\nfrom lzero.entry import train_muzero\ndef main():\n{rest}\n'
        '    train_muzero([EasyDict(main_config), EasyDict(create_config)], seed=0)\n'
    )
    path = write(body=rest + (PROGRAM if guarded else 'main()'), rest=config)
    with pytest.raises(ConfigError, match="mine.py: it calls train_muzero, which is not run here: 'train_unizero'"):
        load_config(path)
    assert os.listdir(os.path.dirname(path)) == ['mine.py']


def test_what_lies_beside_it_can_be_imported_inside_main(write):
    write('a/my_env.py', body='seed = 5')
    main = (
        'def main(seed):\n    from lzero.entry import train_unizero\n    import my_env\n{rest}\n'
        '    train_unizero([main_config, create_config], seed=my_env.seed)'
    )
    config = in_main()
    path = write('a/mine.py', body=main + PROGRAM.replace('main()', 'main(0)'), rest=config)
    assert load_config(path).seed == 5


def test_a_program_has_the_defaults_of_its_own_command_line(write):
    config = in_main()
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
    config = in_main()
    trains = f'{inside}([main_config, create_config], seed=4)'
    path = write('a/mine.py', body=f'{top}\ndef main():\n{config}\n    {trains}' + PROGRAM)
    with mock.patch('ding.config.compile_config', side_effect=AssertionError('a training begins')):
        assert load_config(path).seed == 4
    assert importlib.import_module('launcher').go is lzero.entry.train_unizero
    assert importlib.import_module('late_launcher').go is lzero.entry.train_unizero


def test_loading_trains_nothing_where_a_decorated_main_or_the_file_itself_calls_an_entry(write):
    config = in_main()
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

    with pytest.raises(ConfigError, match=r"main\(\) calls train_muzero, which is not run here: 'train_unizero'"):
        capture_entry_call(main)


def test_capturing_from_a_function_that_trains_nothing():
    with pytest.raises(ConfigError, match='calls none of train_unizero'):
        capture_entry_call(lambda: None)
