"""What the documentation says is so: links, tables, snippets, commands, paths, and the example of docs/design.md."""
import ast
import contextlib
import copy
import importlib.util
import inspect
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from builders import compiled, small_cartpole
from ding.utils import MODEL_REGISTRY
from small_models import ON_MAIN, Case, construct
from zoo.classic_control.cartpole.config import cartpole_unizero_config as cartpole

import lzero_kvcache
from lzero_kvcache import KV_CACHE_REGISTRY, KVCacheManager, config, run_hooks, telemetry
from lzero_kvcache.cache.nodes import NodeTable
from lzero_kvcache.cache.pages import RESERVED_PAGES, extend
from lzero_kvcache.comparison import DATA, PAGE, PICTURES
from lzero_kvcache.host.legacy_reference import CAUSES
from lzero_kvcache.host.patches import TABLE
from lzero_kvcache.telemetry import VALIDATION
from lzero_kvcache.validation.tally import QUANTITIES, Tally
from lzero_kvcache_options import COMMAND, command_parser

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'lzero_kvcache'
READMES = ['README.md', 'README.zh.md']
DOCS = sorted(f'docs/{path.name}' for path in (ROOT / 'docs').glob('*.md'))
PAGES = READMES + DOCS
# What a run, an experiment and a comparison leave behind, and a user's own config.
OF_A_RUN = {
    'log/serial', 'log/train.log', 'ckpt', 'progress.json', 'summary.json', 'total_config.py',
    'formatted_total_config.py', 'data_unizero',
    'data_unizero/cartpole_new_seed0', 'data_unizero/first_look', 'experiment.json', 'data_experiment/NAME', *PICTURES,
    PAGE, DATA
}
OF_A_USER = 'path/to/'
FOLDERS = [ROOT / name for name in ('configs', 'zoo_configs')]
# A file and tags of LightZero's.
ELSEWHERE = {'kv_cache_manager.py', 'Buffer/memory_usage/game_segment_buffer', 'Buffer/num_of_game_segments'}
INSTALL_AND_TRAIN = 'pip install -e . && python train.py --config config_new.py'
INSTALL_AND_TEST = 'pip install -e ".[test]" && python -m pytest'


def read(name):
    return (ROOT / name).read_text(encoding='utf-8')


def tables(name):
    """Every table as rows of cells, without its rule."""
    found, last = [], False
    for line in read(name).split('\n'):
        if line.startswith('|'):
            if not last:
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip('|').split('|')])
        last = line.startswith('|')
    return [[table[0]] + table[2:] for table in found]


def spans(text):
    return re.findall(r'`([^`]+)`', re.sub(r'^```.*?^```$', '', text, flags=re.DOTALL | re.MULTILINE))


def table_with(name, first_key):
    """The rows of the table whose first body cell is ``first_key``, as lists of cells."""
    [table] = [table for table in tables(name) if spans(table[1][0])[:1] == [first_key]]
    return table[1:]


def blocks(name, language):
    found = re.findall(r'^```(\w*)\n(.*?)^```$', read(name), re.DOTALL | re.MULTILINE)
    return [code for kind, code in found if kind == language]


# ---- both READMEs ---------------------------------------------------------------------------------------------------

def test_both_readmes_have_the_same_tables():
    ours, theirs = (tables(name) for name in READMES)
    assert [[len(row) for row in table] for table in ours] == [[len(row) for row in table] for table in theirs]
    for one, other in zip(ours, theirs):
        for row, translated in zip(one, other):
            assert sorted(spans(' '.join(row))) == sorted(spans(' '.join(translated)))


@pytest.mark.parametrize('name', READMES)
def test_no_table_of_a_readme_has_two_rows_of_one_name(name):
    for _, *rows in tables(name):
        names = [row[0] for row in rows]
        assert len(names) == len(set(names))


def test_both_readmes_have_the_same_sections_code_and_figures():
    assert len({tuple(re.findall(r'^#+', read(name), re.MULTILINE)) for name in READMES}) == 1
    for language in ('python', 'bash', ''):
        assert blocks(READMES[0], language) == blocks(READMES[1], language)
    assert figures(READMES[0]) == figures(READMES[1])


def test_both_readmes_link_every_page_of_the_documentation():
    for name in READMES:
        assert set(DOCS) <= set(re.findall(r'\]\(([^)]+)\)', read(name)))


def figures(name):
    """What was measured: in the first three tables."""
    cells = [cell for table in tables(name)[:3] for row in table[1:] for cell in row[1:]]
    return sorted(re.findall(r'[\d.:]*\d', ' '.join(cells)))


def test_the_figures_of_the_readme_are_those_of_the_results():
    results = read('docs/results.md')
    assert len(figures('README.md')) == 22
    for figure in figures('README.md'):
        assert re.search(rf'(?<![\d.,:]){re.escape(figure)}(?![\d.,:]*\d)', results), figure


@pytest.mark.parametrize('name', READMES)
def test_the_first_two_commands(name):
    assert [block.strip() for block in blocks(name, 'bash')[:2]] == [INSTALL_AND_TRAIN, INSTALL_AND_TEST]


def test_ci_runs_exactly_the_test_command():
    assert f"TESTS='{INSTALL_AND_TEST}'" in read('.ci/run')


def test_the_first_snippets_keys_are_where_they_belong():
    names = {}
    exec(blocks('README.md', 'python')[0], names)
    assert config.CacheConfig.read(names['world_model_cfg']).use_new
    assert names['create_config_policy']['import_names'] == ['lzero.policy.unizero', 'lzero_kvcache']


def test_the_snippets_of_the_readme_run(registered, capsys, monkeypatch):
    """In their order, as one script; ``world_model`` is a model's, as the text says."""
    monkeypatch.setattr(cartpole, 'main_config', copy.deepcopy(cartpole.main_config))
    monkeypatch.setattr(cartpole, 'create_config', copy.deepcopy(cartpole.create_config))
    world_model = construct(MODEL_REGISTRY.get('UniZeroModel'), Case(), 2, use_new_cache_manager=True).world_model
    names = {'__name__': 'snippets', 'world_model': world_model}
    for snippet in blocks('README.md', 'python'):
        exec(compile(snippet, 'README.md', 'exec'), names)
    assert 'Using new cache manager: True' in capsys.readouterr().out
    assert names['main_config'].policy.model.world_model_cfg.use_new_cache_manager is False


# ---- docs/options.md ------------------------------------------------------------------------------------------------

class TestOptions:
    NAME = 'docs/options.md'
    SIZES = [dict(), dict(num_simulations=300), dict(num_simulations=25, env_num=3, game_segment_length=50)]

    def test_keys_types_and_meanings(self):
        documented = [[spans(row[0]), spans(row[1]), row[3]] for row in table_with(self.NAME, 'type')]
        assert documented == [
            [[key], [option.kind.__name__], re.sub(r"('\w+')", r'`\1`', option.meaning)]
            for key, option in config.KV_CACHE_CFG.items()
        ]

    @pytest.mark.parametrize('sizes', SIZES, ids=str)
    def test_defaults(self, sizes):
        options = config.CacheConfig.read(dict(sizes, use_new_cache_manager=True))
        known = dict(
            num_simulations=options.num_simulations, env_num=options.env_num,
            game_segment_length=sizes.get('game_segment_length')
        )
        for key, _, default, _ in table_with(self.NAME, 'type'):
            assert eval(spans(default)[0], {}, known) == getattr(options, spans(key)[0]), key

    @pytest.mark.parametrize(('key', 'choices'), [
        (key, option.choices) for key, option in config.KV_CACHE_CFG.items() if option.choices and key != 'type'
    ])
    def test_choices(self, key, choices):
        [meaning] = [row[3] for row in table_with(self.NAME, 'type') if spans(row[0]) == [key]]
        assert set(spans(meaning)) == set(map(repr, choices))

    def test_the_world_models_own_keys(self):
        rows = {spans(row[0])[0]: row for row in table_with(self.NAME, 'use_new_cache_manager')}
        assert list(rows) == [config.FLAG, 'num_simulations', 'env_num', 'game_segment_length', config.OPTIONS]
        assert eval(spans(rows[config.FLAG][2])[0]) is config.CacheConfig.read({}).use_new
        assert [spans(rows[key][3])[-1] for key in ('num_simulations', 'env_num')] == [
            str(config.DEFAULT_NUM_SIMULATIONS), str(config.DEFAULT_ENV_NUM)
        ]
        for collectors, evaluators in ((3, 2), (2, 5)):
            main = small_cartpole(True, collectors=collectors, evaluators=evaluators, simulations=7)
            main.policy.model.world_model_cfg.pop('env_num')
            main.policy.model.world_model_cfg.pop('num_simulations', None)
            policy = compiled(main).policy
            settled = config.settle(policy)
            for key in ('num_simulations', 'env_num'):
                assert eval(spans(rows[key][2])[0], {}, {'max': max, 'policy': policy}) == getattr(settled, key)

    def test_the_log_lines_of_searches_are_in_the_source(self):
        source = read('lzero_kvcache/host/world_model.py')
        for line in blocks(self.NAME, '')[0].strip().split('\n'):
            told = line.split(': Searching ')[1].rsplit(': ', 1)[0].replace('cuda:0', '{device}')
            assert all(part in source for part in re.split(', not as | asks$|(?<=since the model )', told))


# ---- docs/statistics.md, docs/tensorboard.md, docs/log_lines.md ------------------------------------------------------

class TestNumbers:
    STATISTICS, TAGS = 'docs/statistics.md', 'docs/tensorboard.md'

    def test_pools(self):
        assert [spans(row[0]) for row in table_with(self.STATISTICS, 'init')] == [[pool] for pool in telemetry.POOLS]

    def test_metrics_and_who_writes_them(self):
        rows = {spans(row[0])[0]: row[2] == 'yes' for row in table_with(self.TAGS, 'hit_rate')}
        assert list(rows) == [*telemetry.METRICS, 'skipped', 'memory_mb', 'captures', 'search_ms', 'step_ms']
        for flag in (False, True):
            world_model = construct(
                MODEL_REGISTRY.get('UniZeroModel'), Case(), 2, use_new_cache_manager=flag).world_model
            counters = world_model.kv_cache_manager.counters()
            written = set(counters) - set(telemetry.POOLS) | {f'{timing}_ms' for timing in world_model.timings}
            written |= set(counters['init']) | {'hit_rate'}
            assert written == {metric for metric, old in rows.items() if old or flag}

    def test_statistics(self):
        documented = {key: spans(cell) for row in table_with(self.STATISTICS, 'stats_enabled') for key in spans(row[0])
                      for cell in [row[1]]}
        manager = KVCacheManager(dict(env_num=2))
        manager.find_init('eval', [0], ['a key'])
        summary = manager.get_stats_summary()
        assert set(summary) == set(documented)
        assert set(documented['recur_pool']) == set(summary['recur_pool']) == set(summary['init_pools']['env_0'])

    def test_validation(self):
        rows = table_with(self.TAGS, f'{VALIDATION}/value_max')
        first, *others = rows
        documented = {span.split('/')[1] for row in rows for span in spans(row[0])}
        documented |= {f'{span}_{kind}' for span in spans(first[1]) for kind in ('max', 'mean')}
        [causes] = [spans(row[1]) for row in others if spans(row[0]) == [f'{VALIDATION}/cause_padding']]
        documented |= {f'cause_{span}' for span in causes if span != 'legacy'}
        tally = Tally(1., CAUSES)
        tally.add(np.zeros((len(QUANTITIES), 1, 1)), [[frozenset()]])
        assert documented == set(tally.read())

    def test_every_tag_that_is_named(self):
        for name in PAGES:
            for tag in re.findall(r'kv_cache_(?:iter|step)/(\w+)', read(name)):
                assert tag in {'POOL_METRIC', 'skipped', 'memory_mb', 'captures', 'search_ms', 'step_ms'}

    def test_the_log_lines(self, lines, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / 'configs'))
        spec = importlib.util.spec_from_file_location('config_new_of_docs', ROOT / 'configs' / 'config_new.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        KVCacheManager(module.main_config.policy.model.world_model_cfg)
        old, new = ([line for line in block.split('\n') if line] for block in blocks('docs/log_lines.md', ''))
        logged = [f'{level}: {message}' for level, message in lines()]
        assert set(new[1:-1]) <= set(logged)
        assert len(logged) - len(new[1:-1]) == 7  # the other environments
        source = ''.join(path.read_text(encoding='utf-8') for path in PACKAGE.rglob('*.py'))
        said = [line for name in READMES for block in blocks(name, '') for line in block.split('\n') if line]
        for line in [*old, new[0], new[-1], *said]:
            assert repr(line.replace('INFO: ', '')) in source

    def test_the_snippet_runs(self, capsys):
        for flag in (False, True):
            model = construct(MODEL_REGISTRY.get('UniZeroModel'), Case(), 2, use_new_cache_manager=flag)
            exec(blocks('README.md', 'python')[2], {'world_model': model.world_model})
            assert f'Using new cache manager: {flag}' in capsys.readouterr().out


# ---- other pages ----------------------------------------------------------------------------------------------------

def test_the_options_of_train():
    rows = table_with('docs/training.md', '--config FILE')
    listed = {option for row in rows for option in re.findall(r'`(--[\w-]+)', row[0])}
    command = next(action for action in command_parser()._actions if action.dest == 'command')
    known = {option for action in command.choices['train']._actions for option in action.option_strings} - {'-h'}
    assert listed == known


def test_the_training_from_python(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(blocks('docs/training.md', 'python')[0], names)
    assert names['plan'].max_env_step == 300
    assert names['plan'].main_config.policy.num_simulations == 10
    assert not names['plan'].main_config.policy.model.world_model_cfg.use_new_cache_manager


def test_what_a_comparison_writes():
    rows = [row[0] for row in table_with('docs/comparing.md', 'compare.png')]
    assert [span for row in rows for span in spans(row)] == [*PICTURES, PAGE, DATA]


def test_the_snippets_of_managers_by_hand_run(registered, capsys, monkeypatch):
    monkeypatch.setattr(cartpole, 'main_config', copy.deepcopy(cartpole.main_config))
    monkeypatch.setattr(cartpole, 'create_config', copy.deepcopy(cartpole.create_config))
    names = {'__name__': 'snippets'}
    for snippet in blocks('docs/by_hand.md', 'python'):
        exec(compile(snippet, 'docs/by_hand.md', 'exec'), names)
    assert KV_CACHE_REGISTRY.get('watched') is names['WatchedManager']
    cfg = names['main_config'].policy.model.world_model_cfg
    assert cfg.use_new_cache_manager and cfg.kv_cache_cfg.type == 'watched'
    names['WatchedManager'](dict(env_num=2)).count_queries('init', 3, 1)
    assert capsys.readouterr().out == '2 of 3 root contexts were lost\n'


def test_what_is_replaced():
    """The page's table is the code's, row by row."""
    rows = [[spans(row[0]), spans(row[1]), *row[2:]] for row in table_with('docs/patches.md', 'entries')]
    assert rows == [
        [[name], list(patch.targets), patch.replacement, patch.reason, patch.until] for name, patch in TABLE.items()
    ]


def test_what_is_registered():
    """All that the package registers with DI-engine, and where."""
    [classes, hook] = [row for row in tables('docs/patches.md')[0][1:] if 'registered' in row[0]]
    found = set()
    for path in sorted(PACKAGE.rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            called = getattr(node, 'func', None)
            if getattr(called, 'id', None) in ('register_in_place_of', 'register_learner_hook'):
                found.add((called.id, path.relative_to(ROOT).as_posix()))
    assert found == {
        *(('register_in_place_of', file) for file in spans(classes[1])),
        *(('register_learner_hook', file) for file in spans(hook[1])),
    }
    assert set(run_hooks.HOOKS) == set(spans(hook[0]))


# ---- every page -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', PAGES)
def test_links(name):
    for target in re.findall(r'\]\(([^)]+)\)', read(name)):
        assert target.startswith('https://') or ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize('name', PAGES)
def test_paths(name):
    """Everything in backticks that looks like a file or a folder of the project is one."""
    for span in spans(read(name)):
        path, *parts = span.split('::')
        if not re.fullmatch(r'[.\w-]+(/[.\w-]*)+|[\w-]+\.(py|md|json|toml|png|svg|pdf|html)', path):
            continue
        if path.startswith(('kv_cache_', OF_A_USER)) or path in OF_A_RUN | ELSEWHERE or path == 'old/new':
            continue
        there = [base / path for base in (ROOT, PACKAGE, *FOLDERS) if (base / path).exists()]
        assert there, span
        if parts:
            assert _has(there[0], parts), span


def _has(path, parts):
    """Whether a file defines a class or function, and what is named in it."""
    scope = ast.parse(path.read_text(encoding='utf-8')).body
    for part in parts:
        found = [node for node in scope if getattr(node, 'name', None) == part]
        if not found:
            return False
        scope = found[0].body
    return True


@pytest.mark.parametrize('name', PAGES)
def test_names_of_the_package(name):
    """Everything in backticks or snippets that looks like a name in the package is one."""
    for dotted in re.findall(r'\blzero_kvcache((?:\.\w+)+)', read(name)):
        parts = dotted[1:].split('.')
        module = PACKAGE
        while parts and (module / parts[0]).is_dir():
            module /= parts.pop(0)
        if parts and (module / f'{parts[0]}.py').is_file():
            module /= f'{parts.pop(0)}.py'
        if module.is_dir():
            module /= '__init__.py'
        source = module.read_text(encoding='utf-8')
        assert all(re.search(rf'\b{part}\b', source) for part in parts[:1]), dotted


@pytest.mark.parametrize('name', PAGES)
def test_commands(name, monkeypatch):
    monkeypatch.setattr(os.path, 'exists', lambda path: True)  # runs are named that nobody has made here
    commands = [line for block in blocks(name, 'bash') for line in block.split('\n')]
    commands += [span for span in spans(read(name)) if span.startswith(('python ', 'pip '))]
    for command in map(' '.join, map(str.split, commands)):
        if command.startswith(COMMAND + ' '):
            command_parser().parse_args(shlex.split(command[len(COMMAND):]))
        if command.startswith('python train.py '):
            command_parser().parse_args(['train', *shlex.split(command.split(' ', 2)[2])])
        for script in re.findall(r'(?:python|--nproc_per_node=2) (\S+\.py)', command):
            assert (ROOT / script).exists()
            options = read(script) + read('benchmarks/common.py') + read('lzero_kvcache_options.py')
            for option in re.findall(r' (--[\w-]+)', command.split(script)[1]):
                assert f"'{option}'" in options, command
        for config_file in re.findall(r'--config (\S+\.py)', command):
            if not config_file.startswith(OF_A_USER):
                assert any((ROOT / folder / config_file).exists() for folder in ('.', 'configs', 'zoo_configs'))


@pytest.mark.parametrize('name', PAGES)
def test_keys_that_are_named(name):
    """Every key of ``kv_cache_cfg`` that a page or a command names is one."""
    for key in re.findall(r'kv_cache_cfg\.(\w+)', read(name)):
        assert key in config.KV_CACHE_CFG, key


# ---- docstrings ------------------------------------------------------------------------------------------------------

# What is imported from `host`, by its modules, for subclasses; the last of LightZero's main branch alone.
SUBCLASSED = {
    'world_model': ['NewWorldModel'], 'old_world_model': ['OldWorldModel'],
    'models': ['UniZeroModel', 'SampledUniZeroModel'], 'policies': ['UniZeroPolicy', 'SampledUniZeroPolicy'],
    'ppo': ['NewPPOWorldModel', 'OldPPOWorldModel', 'UniZeroPPOModel', 'UniZeroPPOPolicy'],
}


def public():
    """The classes and functions that users import, by name."""
    found = {name: getattr(lzero_kvcache, name) for name in lzero_kvcache.__all__}
    for module, names in SUBCLASSED.items():
        if module != 'ppo' or ON_MAIN:
            of_host = importlib.import_module(f'lzero_kvcache.host.{module}')
            found.update((name, getattr(of_host, name)) for name in names)
    return {name: value for name, value in found.items() if inspect.isclass(value) or inspect.isfunction(value)}


def ours(kind):
    """A class and its bases, as far as they are the package's."""
    return [base for base in kind.__mro__ if base.__module__.split('.')[0] == PACKAGE.name]


def sections(docstring):
    """The parts of a docstring in DI-engine's form by their headings, each as lines."""
    parts = {}
    for line in inspect.cleandoc(docstring or '').split('\n'):
        if re.fullmatch(r'[A-Z]\w+:', line):
            lines = parts[line[:-1]] = []
        elif parts and line:
            lines.append(line)
    return parts


def items(lines):
    """The names that a part of a docstring lists, each with a type."""
    return re.findall(r'^ {4}- (\w+) \(:obj:`[^`]+`\): \S', '\n'.join(lines), re.MULTILINE)


def parameters(function):
    return [parameter for name, parameter in inspect.signature(function).parameters.items()
            if name not in ('self', 'cls')]


def check_function(function, docstring):
    parts = sections(docstring)
    assert parts.get('Overview')
    assert items(parts.get('Arguments', [])) == [parameter.name for parameter in parameters(function)]
    answers = inspect.signature(function).return_annotation not in (None, 'None', inspect.Signature.empty)
    assert bool(items(parts.get('Returns', []))) == answers


def inherited_docstring(kind, name):
    found = (vars(base)[name] for base in ours(kind) if name in vars(base))
    return next(filter(None, (getattr(value, '__func__', value).__doc__ for value in found)), '')


@pytest.mark.parametrize('name', sorted(public()))
def test_what_users_import_says_what_it_does(name):
    value = public()[name]
    assert sections(value.__doc__).get('Overview')
    if inspect.isfunction(value):
        check_function(value, value.__doc__)


@pytest.mark.parametrize('name', sorted(name for name, value in public().items() if inspect.isclass(value)))
def test_what_users_import_names_the_arguments_of_its_constructor(name):
    kind = public()[name]
    init = next((vars(base)['__init__'] for base in ours(kind) if '__init__' in vars(base)), None)
    expected = parameters(init) if init else []
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in expected):
        return  # LightZero's own constructor has the arguments
    exported = [base for base in ours(kind) if base in public().values()]
    documented = next(filter(None, (sections(base.__doc__).get('Arguments') for base in exported)), [])
    # The keys of an option are documented where they are defined.
    assert items(documented) == [parameter.name for parameter in expected if not (
        kind is config.CacheConfig and parameter.name in config.KV_CACHE_CFG)]


METHODS = sorted({
    f'{name}.{attribute}' for name, kind in public().items() if inspect.isclass(kind)
    for base in ours(kind) for attribute, value in vars(base).items()
    if not attribute.startswith('_')
    and (inspect.isfunction(value) or isinstance(value, (property, classmethod, staticmethod)))
})


@pytest.mark.parametrize('method', METHODS)
def test_methods_say_what_they_do(method):
    """Or the method that they override does."""
    name, attribute = method.split('.')
    kind = public()[name]
    value = inspect.getattr_static(kind, attribute)
    docstring = inherited_docstring(kind, attribute)
    if isinstance(value, property):
        assert docstring
    else:
        check_function(getattr(value, '__func__', value), docstring)


def test_what_only_the_main_branch_has_says_what_it_does():
    classes = [node for node in ast.parse(read('lzero_kvcache/host/ppo.py')).body if isinstance(node, ast.ClassDef)]
    documented = [node.name for node in classes if sections(ast.get_docstring(node)).get('Overview')]
    assert sorted(documented) == SUBCLASSED['ppo']


def test_every_class_that_users_are_told_to_derive_from_is_held_to_that():
    told = ''.join(map(read, PAGES)) + ''.join(path.read_text(encoding='utf-8') for path in PACKAGE.rglob('*.py'))
    named = set(re.findall(r'\blzero_kvcache\.host\.(\w+)(?:\.| import )([A-Z]\w+)', told))
    assert ('world_model', 'NewWorldModel') in named
    assert named <= {(module, name) for module, names in SUBCLASSED.items() for name in names}


# ---- docs/design.md: the drawn search tree --------------------------------------------------------------------------


class TestExample:
    """The drawn search tree, with the page ids that it has here: P0 is the first one that is not reserved."""
    CONTEXTS = [[cell.strip('`') for cell in row] for row in next(
        table[1:] for table in tables('docs/design.md') if table[0][0] == 'context'
    )]
    CONTEXT_LENGTH, WIDTH = 8, 3

    def pages(self, text):
        return [int(name[1:]) + RESERVED_PAGES for name in text.split()]

    def row(self, text):
        ids = self.pages(text)
        table = np.zeros((1, self.WIDTH), np.int64)
        table[0, :len(ids)] = ids
        return table, np.array([len(ids)])

    def contexts(self):
        return {name: self.row(pages) for name, _, _, pages, _, _ in self.CONTEXTS}

    def check(self, found, expected):
        for ours, documented in zip(found, expected):
            assert ours.tolist() == documented.tolist()

    def test_each_context_is_its_parents_and_one_page(self):
        found = {'': (np.zeros((1, self.WIDTH), np.int64), np.zeros(1, np.int64))}
        for name, parent, page, pages, _, _ in self.CONTEXTS:
            found[name] = extend(found[parent], np.array(self.pages(page)))
            self.check(found[name], self.row(pages))

    def test_by_node(self):
        contexts = self.contexts()
        made = [row for row in self.CONTEXTS if row[0].startswith('node')]
        ids = np.array([self.pages(page)[0] for _, _, page, _, _, _ in made])
        nodes = NodeTable(contexts['root 1'], ids)
        path = {'root 1': 0}
        for simulation, (name, parent, page, _, _, _) in enumerate(made):
            found = nodes.expand(simulation, np.array([path[parent]]), np.array([0]))
            self.check(found, contexts[parent])
            assert nodes.pages[simulation].tolist() == self.pages(page)
            path[name] = simulation + 1
        last = nodes._tables[len(made)], nodes._counts[len(made)]
        self.check(last, contexts['node 3'])

    def test_by_key(self):
        manager = KVCacheManager(dict(context_length=self.CONTEXT_LENGTH, env_num=1, num_simulations=3))
        for name, parent, page, pages, _, _ in self.CONTEXTS:
            with manager.lease() as lease:
                ids = lease.allocate(1)
                assert ids.tolist() == self.pages(page)
                rows = np.zeros((1, self.WIDTH), np.int64), np.zeros(1, np.int64)
                if parent:
                    rows = manager.find_recur('collect', [0], [parent])
                child = extend(rows, ids)
                self.check(child, self.row(pages))
                if name.startswith('root'):
                    manager.store_init('collect', [0], [name], child)
                else:
                    manager.store_recur([0], [name], child)
        manager.clear_recur_cache()
        assert manager.pages_used == 2


def moved_to():
    """What the change log says that modules are now called, `.name` being one of the same package, or of a room."""
    table = read('CHANGELOG.md').split('| before | now |')[1].split('\n\n')[0]
    for row in table.split('\n')[2:]:
        whole = ''
        for name in re.findall(r'`((?:lzero_kvcache)?\.[\w.]+)`', row.split('|')[2]):
            whole = name if not name.startswith('.') else whole
            yield whole, name


def test_the_change_log_names_modules_that_are_there():
    names = list(moved_to())
    assert len(names) > 25
    for whole, name in names:
        parents = ['lzero_kvcache', whole.rpartition('.')[0]] if name.startswith('.') else ['']
        assert any(map(is_there, [parent + name for parent in parents])), name


def is_there(name):
    """Whether a module is there, or what a module has."""
    parent, _, last = name.rpartition('.')
    with contextlib.suppress(ModuleNotFoundError):
        module = importlib.import_module(parent)
        return hasattr(module, last) or importlib.util.find_spec(name) is not None
    return False
