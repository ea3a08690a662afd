"""The configs of ``zoo_configs/``: LightZero's own and nothing but the plugin; a training of each in both systems."""
import copy
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import ale_py.roms
import pytest
import zoo
from ding.utils import ENV_REGISTRY, POLICY_REGISTRY, deep_merge_dicts
from lzero.policy import sampled_unizero
from small_models import ON_MAIN, adapter
from trainings import (
    ITERATIONS,
    PROJECT_ROOT,
    SMALL,
    WM,
    check_run,
    import_what_trainings_import,
    short_episodes,
    summary_of,
    trained,
    trained_by_two,
)

from lzero_kvcache import ConfigError, check_config, disable, enable, info
from lzero_kvcache.search import roots
from lzero_kvcache.training import load_config
from lzero_kvcache_options import LIGHTZERO_PREFIX, lightzero_configs

SHIPPED = {path.stem: path for path in Path(zoo.__file__).parent.rglob('*unizero*_config.py')}
NAMES = sorted(
    name[:-3] for name in os.listdir(os.path.join(PROJECT_ROOT, 'zoo_configs'))
    if name.endswith('.py') and not name.startswith('_')
)
# Of LightZero's Memory config, for the game that it gives other values for in comments.
OF_OURS = {'memory_key_to_door_unizero_config'}
ATARI = [name for name in NAMES if name.startswith('atari')]
SEVERAL = [name for name in NAMES if 'ddp' in name]
SYSTEMS = ['old', 'new']
OF_EACH_FAMILY = ['cartpole_unizero_config', 'lunarlander_disc_unizero_config', 'memory_unizero_config',
                  'atari_unizero_segment_config']


def leaves(tree, prefix=''):
    """From dotted path to value."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found.update(leaves(value, f'{prefix}{key}.'))
        else:
            found[prefix + key] = value
    return found


def difference(one, other):
    """The paths that differ, with both values."""
    one, other = leaves(one), leaves(other)
    return {key: (one.get(key), other.get(key)) for key in {**one, **other} if one.get(key) != other.get(key)}


def lightzeros_own(name):
    """What LightZero's own file declares."""
    if name != 'atari_unizero_stack4_config':
        return load_config(str(SHIPPED[name]))
    with pytest.raises(ConfigError, match=rf"^LightZero's own {SHIPPED[name]}:3 fails: ImportError: cannot import"):
        load_config(str(SHIPPED[name]))
    # The file without the import that fails, on what it would have imported.
    base = load_config(str(SHIPPED['atari_unizero_config']))
    source = SHIPPED[name].read_text()
    names = dict(
        __name__='stack4', atari_unizero_config=base.main_config, atari_unizero_create_config=base.create_config)
    exec(re.sub(r'^from zoo.atari.config.atari_unizero_config import .*$', '', source, flags=re.MULTILINE), names)
    base.main_config, base.create_config = names['main_config'], names['create_config']
    base.max_env_step = names['max_env_step']
    return base


# ---------------------------------------------------------------------------------------------------- what they declare


OF_THE_RELEASE = pytest.mark.skipif(ON_MAIN, reason="of the zoo of the released LightZero")


@OF_THE_RELEASE
def test_every_config_that_lightzero_ships_is_there():
    assert len(SHIPPED) == 12
    assert set(NAMES) == set(SHIPPED) | OF_OURS


@OF_THE_RELEASE
@pytest.mark.parametrize('name', sorted(SHIPPED))
def test_a_config_is_lightzeros_own_and_the_plugin(name):
    ours, own = load_config(name), lightzeros_own(name)
    assert difference(own.main_config, ours.main_config) == {f'{WM}.use_new_cache_manager': (None, True)}
    names = own.create_config.policy.import_names
    assert difference(own.create_config, ours.create_config) == {
        'policy.import_names': (names, [*names, 'lzero_kvcache'])}
    assert (ours.seed, ours.max_env_step) == (own.seed, own.max_env_step)
    main_config = copy.deepcopy(own.main_config)
    enable(main_config, own.create_config)
    assert (main_config, own.create_config) == (ours.main_config, ours.create_config)


def test_key_to_door_is_the_other_game_with_its_lengths():
    ours, match = load_config('memory_key_to_door_unizero_config'), load_config('memory_unizero_config')
    assert ours.create_config == match.create_config
    assert (ours.entry, ours.seed, ours.max_env_step) == (match.entry, match.seed, match.max_env_step)
    assert difference(match.main_config, ours.main_config) == {
        'env.env_id': ('visual_match', 'key_to_door'),
        'env.max_frames.explore': (1, 15),
        'policy.num_unroll_steps': (76, 90),
        'policy.game_segment_length': (76, 90),
        'policy.td_steps': (76, 90),
        f'{WM}.max_blocks': (81, 95),
        f'{WM}.max_tokens': (162, 190),
        f'{WM}.context_length': (162, 190),
    }
    for loaded in (ours, match):
        assert loaded.main_config.policy.num_unroll_steps == sum(loaded.main_config.env.max_frames.values())


@pytest.mark.parametrize('name', NAMES)
def test_a_config_is_valid_in_both_systems(name):
    loaded = load_config(name)
    for switch, new in ((disable, False), (enable, True)):
        switch(loaded.main_config, loaded.create_config)
        options = check_config(loaded.main_config, loaded.create_config)
        assert options.use_new is new
    policy = loaded.main_config.policy
    default = POLICY_REGISTRY.get(loaded.create_config.policy.type).default_config()
    merged = deep_merge_dicts(default, policy)
    assert options.num_simulations == adapter().simulations_of(merged)
    assert options.env_num == max(policy.collector_env_num, policy.evaluator_env_num)


@OF_THE_RELEASE
def test_the_table_of_the_zoo():
    """Names, observations, actions, positions, contexts and extras; the other columns are what was seen."""
    text = Path(PROJECT_ROOT, 'docs', 'zoo.md').read_text(encoding='utf-8')
    rows = [
        [cell.strip() for cell in line.strip('|').split('|')] for line in text.split('\n')
        if re.match(r'\| `\w+_unizero\w*_config` \|', line)
    ]
    assert sorted(row[0].strip('`') for row in rows) == NAMES
    for name, observation, actions, positions, context, extra, *_ in rows:
        loaded = load_config(name.strip('`'))
        defaults = POLICY_REGISTRY.get(loaded.create_config.policy.type).default_config()
        model = deep_merge_dicts(defaults, loaded.main_config.policy).model
        shape = model.observation_shape
        assert observation == ' x '.join(map(str, [shape] if isinstance(shape, int) else shape))
        assert int(re.match(r'\d+', actions).group()) == model.action_space_size
        continuous = model.world_model_cfg.continuous_action_space
        assert len(actions.split(' ', 1)) == 1 + continuous
        assert (positions == 'rotary') == model.world_model_cfg.rotary_emb
        assert int(context) == model.world_model_cfg.context_length
        source = Path(loaded.config).read_text(encoding='utf-8')
        assert re.search(r'pip install -e (?:"\.\[(\w+)\]"|\.)', source).group(1) == (
            None if extra == '-' else extra.strip('`'))


# ---------------------------------------------------------------------------------------------------- what is missing


def without(module, *users):
    """Let a module be one that is not installed, also for those that have imported it."""

    def prepare():
        for name in list(sys.modules):
            if name.split('.')[0] == module or name.startswith(users):
                del sys.modules[name]
        for name, kind in list(ENV_REGISTRY.items()):
            if kind.__module__.startswith(users):
                del ENV_REGISTRY[name]
        sys.modules[module] = None

    return prepare


#: Later ones have them all in the package.
BRINGS_ROMS = hasattr(ale_py.roms, 'get_rom_path')


def without_roms():
    """Let ale-py find no ROM, whatever is installed."""
    from ale_py import roms
    roms._ROM_PLUGIN_REGISTRY.clear()
    roms.__getattr__.cache_clear()


BOX2D = ('gymnasium.envs.box2d', )
MEMORY = ('zoo.memory.envs', )
MISSING = {
    'Box2D': ('lunarlander_disc_unizero_config', without('Box2D', *BOX2D), 'pip install Box2D==2.3.10'),
    'pycolab': ('memory_unizero_config', without('pycolab', *MEMORY), "pip install 'pycolab==1.2'"),
    'cv2': ('atari_unizero_config', without('cv2', 'zoo.atari.envs'), "pip install 'opencv-python-headless<4.11'"),
    'ROM': ('atari_unizero_config', without_roms, 'ale-import-roms atari_roms/ale_py/roms'),
}


@pytest.mark.parametrize('missing', MISSING)
def test_what_is_missing_is_said_in_one_line(missing, tmp_path):
    name, prepare, command = MISSING[missing]
    if missing == 'Box2D' and ON_MAIN:
        pytest.skip('its LunarLander is one of another gymnasium')
    if missing == 'ROM':
        pytest.importorskip('cv2')
        if BRINGS_ROMS:
            pytest.skip('this ale-py brings its ROM files along')
    [(code, printed)] = trained(tmp_path, ['--config', name], prepare)
    lines = [line for line in printed.splitlines() if line.startswith('lzero-kvcache: error: ')]
    assert code == 2, printed
    assert len(lines) == 1
    assert lines[0].endswith(command)
    assert os.listdir(str(tmp_path)) == ['printed0']


# ---------------------------------------------------------------------------------------------------- real trainings

# An episode of Pong has a thousand steps, and it must have ended before one is trained on.
SHORT_ATARI = [
    'env.collect_max_episode_steps=16', 'env.eval_max_episode_steps=16', 'policy.train_start_after_envsteps=0',
    'policy.game_segment_length=16',
]
ONE_PROCESS = ['policy.multi_gpu=False', 'policy.n_episode=2', 'policy.num_segments=2']
# Of two environments each.
TWO_PROCESSES = ['policy.n_episode=4', 'policy.num_segments=4', 'policy.batch_size=4']


def changes(name):
    """What makes a config one that trains within seconds."""
    stem = name.replace(LIGHTZERO_PREFIX, '')
    if stem.startswith('atari'):
        return SMALL + SHORT_ATARI
    return memory(name, distractor=5) if stem.startswith('memory') else SMALL


def memory(name, distractor):
    """Whole episodes are trained on, so that their length stands in four places. Contexts of the longer game stay as
    they are: LightZero's models have a tensor for any two tokens of a context, and copy all of them for seconds."""
    length = sum({**load_config(name).main_config.env.max_frames, 'distractor': distractor}.values())
    lengths = dict.fromkeys(('num_unroll_steps', 'game_segment_length', 'td_steps'), length)
    if name not in OF_OURS:
        blocks = length + 5  # as many more as in LightZero's config
        lengths.update({'model.world_model_cfg.max_blocks': blocks, 'model.world_model_cfg.max_tokens': 2 * blocks,
                        'model.world_model_cfg.context_length': 2 * blocks})
    return [*SMALL, f'env.max_frames.distractor={distractor}', 'env.collector_env_num=3',
            *(f'policy.{key}={number}' for key, number in lengths.items())]


def note(file, number):
    """Add a line; what happens in a fork leaves no other trace."""
    with open(str(file), 'a', encoding='utf-8') as lines:
        lines.write(f'{number}\n')


def noted(file):
    return [int(line) for line in file.read_text(encoding='utf-8').splitlines()]


def needed(name):
    """Skip where the environment's libraries are not installed, or are too new for it."""
    if ON_MAIN and name.startswith(('lunarlander_cont', 'bipedalwalker')):
        pytest.skip('its environment is of an older gymnasium than the main branch')
    for prefix, modules in (('atari', ('cv2', )), ('lunarlander', ('Box2D', 'pygame')),
                            ('bipedalwalker', ('Box2D', 'pygame')), ('memory', ('pycolab', ))):
        if name.startswith(prefix):
            for module in modules:
                pytest.importorskip(module)


@pytest.fixture(scope='module')
def rom_folder(tmp_path_factory):
    """A folder with Pong's ROM: what ``ale-import-roms`` would import; None where it has been."""
    from ale_py import roms
    if hasattr(roms, 'Pong') or BRINGS_ROMS:
        return None
    folder = tmp_path_factory.mktemp('roms')
    done = subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '--quiet', '--target', str(folder), '--no-deps', 'ale-py==0.10.1'],
        encoding='utf-8', stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        pytest.skip('pip finds no ROM files: ' + ' '.join(done.stdout.split())[-200:])
    return folder / 'ale_py' / 'roms'


def with_roms(folder):
    """What to do in a fork before it trains."""

    def prepare():
        short_episodes()
        if folder is not None:
            from ale_py import roms
            roms.register_plugin(roms.plugins.Directory(str(folder)))

    return prepare


@pytest.fixture(scope='module')
def heavy_imports():
    import_what_trainings_import()


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'cache'), [
    *((name, 'new') for name in NAMES), *((name, 'old') for name in OF_EACH_FAMILY)])
def test_a_training_in_its_own_environment(name, cache, tmp_path, heavy_imports, request):
    needed(name)
    roms = request.getfixturevalue('rom_folder') if name in ATARI else None
    arguments = ['--config', name, '--cache', cache, *changes(name), *(ONE_PROCESS if name in SEVERAL else [])]
    [(code, printed)] = trained(tmp_path, arguments, with_roms(roms))
    assert code == 0, printed
    assert ('Using NEW KVCacheManager' if cache == 'new' else 'Using OLD cache system') in printed
    assert check_run(tmp_path / 'run', cache)['entry'] == load_config(name).entry


@pytest.mark.slow
@pytest.mark.skipif(not ON_MAIN, reason="of LightZero's main branch")
@pytest.mark.parametrize('cache', SYSTEMS)
@pytest.mark.parametrize('name', [name[len(LIGHTZERO_PREFIX):] for name in lightzero_configs()])
def test_a_config_of_lightzeros_main_branch_trains(name, cache, tmp_path, heavy_imports, monkeypatch, request):
    monkeypatch.setattr(info, 'our_configs', dict)
    of_lightzero = LIGHTZERO_PREFIX + name
    monkeypatch.setattr(info, 'lightzero_configs', lambda: {of_lightzero: lightzero_configs()[of_lightzero]})
    [(_, said)] = info.of_zoo()
    if not said.endswith(': installed'):
        pytest.skip(said)
    if 'sampled' in name and 'use_adaptive_entropy_weight = ' not in inspect.getsource(sampled_unizero):
        pytest.skip('its Sampled UniZero cannot save a checkpoint')
    roms = request.getfixturevalue('rom_folder') if name.startswith('atari') else None
    arguments = ['--config', LIGHTZERO_PREFIX + name, '--cache', cache, *changes(LIGHTZERO_PREFIX + name),
                 *(ONE_PROCESS if 'ddp' in name else [])]
    if 'sampled' in name:  # LightZero's takes an evaluation's rows for a collection's, which must be as many
        arguments.append('env.evaluator_env_num=2')
    [(code, printed)] = trained(tmp_path, arguments, with_roms(roms))
    assert code == 0, printed
    if 'ppo' not in name:
        check_run(tmp_path / 'run', cache)
        return
    summary = summary_of(tmp_path / 'run')  # all updates of a collection are made
    assert (summary['cache'], summary['train_iter'] >= ITERATIONS) == (cache, True)
    assert summary['hit_rates']['recur'] is None
    assert cache == 'old' or summary['hit_rates']['init'] == 1.


@pytest.mark.slow
@pytest.mark.parametrize('name', OF_EACH_FAMILY)
def test_environments_in_processes_of_their_own(name, tmp_path, heavy_imports, request):
    """By the manager that LightZero's configs name; in the other trainings one process has all environments."""
    needed(name)
    roms = request.getfixturevalue('rom_folder') if name in ATARI else None
    forks = tmp_path / 'forks'

    def prepare():
        with_roms(roms)()
        os.register_at_fork(after_in_child=lambda: note(forks, os.getpid()))

    own_manager = [change for change in changes(name) if not change.startswith('create_config.env_manager')]
    assert load_config(name).create_config.env_manager.type == 'subprocess'
    [(code, printed)] = trained(tmp_path, ['--config', name, '--cache', 'new', *own_manager], prepare)
    assert code == 0, printed
    check_run(tmp_path / 'run', 'new')
    collectors, evaluators = 3 if name.startswith('memory') else 2, 1
    assert len(noted(forks)) == collectors + evaluators


@pytest.mark.slow
def test_contexts_fill_and_slide(tmp_path, heavy_imports):
    """Episodes of more steps than a context has room for; the other trainings of Memory end before."""
    name, distractor, context_length = 'memory_unizero_config', 20, 20
    needed(name)
    slid = tmp_path / 'slid'

    def prepare():
        short_episodes()
        extend = roots.extend

        def watched(rows, pages):
            tables, counts = rows
            note(slid, (counts == tables.shape[1]).sum())
            return extend(rows, pages)

        roots.extend = watched  # what root contexts go through; in the fork, and nowhere else

    small = [*memory(name, distractor), f'{WM}.context_length={context_length}']
    [(code, printed)] = trained(tmp_path, ['--config', name, '--cache', 'new', *small], prepare)
    assert code == 0, printed
    check_run(tmp_path / 'run', 'new')
    # Three environments collect and one is evaluated, twice; none ends before its distractor has.
    full = context_length // 2 - 1
    assert noted(slid)[:full + 1] == [0] * full + [1]
    assert max(noted(slid)) == 3
    assert sum(noted(slid)) >= 5 * (1 + distractor - full)


@pytest.mark.slow
@pytest.mark.parametrize('cache', SYSTEMS)
@pytest.mark.parametrize('name', SEVERAL)
def test_two_processes(name, cache, tmp_path, rom_folder, heavy_imports):
    """As torchrun starts them; ``test_several_processes.py`` has torchrun itself."""
    needed(name)
    arguments = ['--config', name, '--cache', cache, *changes(name), *TWO_PROCESSES]
    ends = trained_by_two(tmp_path, arguments, lambda rank: with_roms(rom_folder)())
    assert [code for code, _ in ends] == [0, 0], ends
    assert check_run(tmp_path / 'run', cache)['processes'] == 2
