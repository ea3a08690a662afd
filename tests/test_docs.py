"""What the documentation says is so: tables, snippets, paths, the drawn example and the rooms' imports."""
import ast
import copy
import importlib.util
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Optional

import numpy as np
import pytest
from builders import compiled, small_cartpole
from ding.utils import MODEL_REGISTRY
from oracle import Case, construct
from zoo.classic_control.cartpole.config import cartpole_unizero_config as cartpole

from lzero_kvcache import KV_CACHE_REGISTRY, KVCacheManager, config, telemetry
from lzero_kvcache import __main__ as tools
from lzero_kvcache.cache.nodes import NodeTable
from lzero_kvcache.cache.pages import RESERVED_PAGES, extend
from lzero_kvcache.host.reference import CAUSES
from lzero_kvcache.telemetry import VALIDATION
from lzero_kvcache.training.cli import build_parser
from lzero_kvcache.validation.tally import QUANTITIES, Tally

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'lzero_kvcache'
READMES = ['README.md', 'README.zh.md']
PAGES = READMES + ['docs/design.md', 'docs/lightzero_main.md', 'docs/validation.md', 'docs/your_project.md']
FOLDERS = {path.parent.name for path in PACKAGE.glob('*/__init__.py')}
# What a run leaves behind.
OF_A_RUN = {
    'log/serial', 'log/train.log', 'ckpt', 'summary.json', 'data_unizero', 'data_unizero/cartpole_new_seed0',
    'total_config.py'
}
OF_AN_EXPERIMENT = {'experiment.json', 'data_experiment/NAME'}
OF_A_COMPARISON = {'compare.png', 'compare.json'}
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


def test_both_readmes_have_the_same_sections_and_code():
    assert len({tuple(re.findall(r'^#+', read(name), re.MULTILINE)) for name in READMES}) == 1
    for language in ('python', 'bash', ''):
        assert blocks(READMES[0], language) == blocks(READMES[1], language)


@pytest.mark.parametrize('name', READMES)
def test_the_first_two_commands(name):
    assert [block.strip() for block in blocks(name, 'bash')[:2]] == [INSTALL_AND_TRAIN, INSTALL_AND_TEST]


def test_ci_runs_exactly_the_test_command():
    assert f"TESTS='{INSTALL_AND_TEST}'" in read('.ci/run')


@pytest.mark.parametrize('name', READMES)
class TestOptions:
    SIZES = [dict(), dict(num_simulations=300), dict(num_simulations=25, env_num=3, game_segment_length=50)]

    def test_keys(self, name):
        assert [spans(row[0]) for row in table_with(name, 'type')] == [[key] for key in config.KV_CACHE_CFG]

    @pytest.mark.parametrize('sizes', SIZES, ids=str)
    def test_defaults(self, name, sizes):
        options = config.CacheConfig.read(sizes, KV_CACHE_REGISTRY)
        known = dict(
            num_simulations=options.num_simulations, env_num=options.env_num,
            game_segment_length=sizes.get('game_segment_length')
        )
        for key, _, default, _ in table_with(name, 'type'):
            assert eval(spans(default)[0], {}, known) == getattr(options, spans(key)[0]), key

    def test_types(self, name):
        types = {field.name: field.type for field in fields(config.CacheConfig)}
        types['max_memory_mb'] = {Optional[float]: float}[types['max_memory_mb']]
        for key, kind, _, _ in table_with(name, 'type'):
            assert spans(kind) == [types[spans(key)[0]].__name__], key

    @pytest.mark.parametrize(('key', 'choices'), [
        ('eviction', config.EVICTIONS), ('dtype', config.DTYPES), ('backend', config.BACKENDS),
        ('on_nan', config.ON_NAN), ('validation', config.VALIDATIONS), ('validation_action', config.VALIDATION_ACTIONS),
    ])
    def test_choices(self, name, key, choices):
        [meaning] = [row[3] for row in table_with(name, 'type') if spans(row[0]) == [key]]
        assert sorted(spans(meaning)) == sorted(map(repr, choices))

    def test_the_world_models_own_keys(self, name):
        rows = {spans(row[0])[0]: row for row in table_with(name, 'use_new_cache_manager')}
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
            settled = config.settle(policy, KV_CACHE_REGISTRY)
            for key in ('num_simulations', 'env_num'):
                assert eval(spans(rows[key][2])[0], {}, {'max': max, 'policy': policy}) == getattr(settled, key)


@pytest.mark.parametrize('name', READMES)
class TestTags:

    def test_pools(self, name):
        assert [spans(row[0]) for row in table_with(name, 'init')] == [[pool] for pool in telemetry.POOLS]

    def test_metrics_and_who_writes_them(self, name):
        rows = {spans(row[0])[0]: row[2] in ('yes', '有') for row in table_with(name, 'hit_rate')}
        assert list(rows) == [*telemetry.METRICS, 'skipped', 'memory_mb', 'search_ms', 'step_ms']
        for flag in (False, True):
            world_model = construct(
                MODEL_REGISTRY.get('UniZeroModel'), Case(), 2, use_new_cache_manager=flag).world_model
            counters = world_model.kv_cache_manager.counters()
            written = set(counters) - set(telemetry.POOLS) | {f'{timing}_ms' for timing in world_model.timings}
            written |= set(counters['init']) | {'hit_rate'}
            assert written == {metric for metric, old in rows.items() if old or flag}

    def test_validation(self, name):
        rows = table_with(name, f'{VALIDATION}/value_max')
        first, *others = rows
        documented = {span.split('/')[1] for row in rows for span in spans(row[0])}
        documented |= {f'{span}_{kind}' for span in spans(first[1]) for kind in ('max', 'mean')}
        [causes] = [spans(row[1]) for row in others if spans(row[0]) == [f'{VALIDATION}/cause_padding']]
        documented |= {f'cause_{span}' for span in causes if span != 'legacy'}
        tally = Tally(1., CAUSES)
        tally.add(np.zeros((len(QUANTITIES), 1, 1)), [[frozenset()]])
        assert documented == set(tally.read())

    def test_every_tag_that_is_named(self, name):
        for tag in re.findall(r'kv_cache_(?:iter|step)/(\w+)', read(name)):
            assert tag in {'POOL_METRIC', 'skipped', 'memory_mb', 'search_ms', 'step_ms'}


@pytest.mark.parametrize('name', READMES)
def test_the_options_of_train(name):
    listed = {option for row in table_with(name, '--config FILE') for option in re.findall(r'`(--[\w-]+)', row[0])}
    known = {option for action in build_parser()._actions for option in action.option_strings} - {'-h'}
    assert listed == known


@pytest.mark.parametrize('name', READMES)
def test_the_log_lines(name, lines, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'configs'))
    spec = importlib.util.spec_from_file_location('config_new_of_docs', ROOT / 'configs' / 'config_new.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    KVCacheManager(module.main_config.policy.model.world_model_cfg)
    old, new = ([line for line in block.split('\n') if line] for block in blocks(name, ''))
    logged = [f'{level}: {message}' for level, message in lines()]
    assert set(new[1:-1]) <= set(logged)
    assert len(logged) - len(new[1:-1]) == 7  # the other environments
    source = ''.join(path.read_text(encoding='utf-8') for path in PACKAGE.glob('*.py'))
    for line in [*old, new[0], new[-1]]:
        assert repr(line.replace('INFO: ', '')) in source


@pytest.mark.parametrize('name', READMES)
def test_the_snippets_run(name, registered, capsys, monkeypatch):
    """In their order, as one script; ``world_model`` is a model's, as the text says."""
    monkeypatch.setattr(cartpole, 'main_config', copy.deepcopy(cartpole.main_config))
    monkeypatch.setattr(cartpole, 'create_config', copy.deepcopy(cartpole.create_config))
    world_model = construct(MODEL_REGISTRY.get('UniZeroModel'), Case(), 2, use_new_cache_manager=True).world_model
    names = {'__name__': 'snippets', 'world_model': world_model}
    snippets = blocks(name, 'python')
    for snippet in snippets:
        exec(compile(snippet, name, 'exec'), names)
    assert 'Using new cache manager: True' in capsys.readouterr().out
    assert KV_CACHE_REGISTRY.get('watched') is names['WatchedManager']
    cfg = names['main_config'].policy.model.world_model_cfg
    assert cfg.use_new_cache_manager and cfg.kv_cache_cfg.type == 'watched'
    names['WatchedManager'](dict(env_num=2)).count_queries('init', 3, 1)
    assert capsys.readouterr().out == '2 of 3 root contexts were lost\n'


def test_the_first_snippets_keys_are_where_they_belong():
    names = {}
    exec(blocks('README.md', 'python')[0], names)
    assert config.CacheConfig.read(names['world_model_cfg']).use_new
    assert names['create_config_policy']['import_names'] == ['lzero.policy.unizero', 'lzero_kvcache']


@pytest.mark.parametrize('name', READMES)
def test_the_layout_names_every_module(name):
    listed = {path for row in table_with(name, 'lzero_kvcache/config.py') for path in spans(row[0])}
    assert {path for path in listed if path.endswith('.py')} == {
        f'lzero_kvcache/{path.name}' for path in PACKAGE.glob('*.py') if path.name != '__init__.py'
    }


# ---- every page -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', PAGES)
def test_links(name):
    for target in re.findall(r'\]\(([^)]+)\)', read(name)):
        assert target.startswith('https://') or ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize('name', READMES + ['docs/design.md'])
def test_paths(name):
    """Everything in backticks that looks like a file or a folder of the project is one."""
    for span in spans(read(name)):
        path = span.split('::')[0]
        if re.fullmatch(r'[.\w-]+(/[.\w-]*)+|[\w-]+\.(py|md|json|toml|png)', path) and not path.startswith('kv_cache_'):
            assert path in OF_A_RUN | OF_AN_EXPERIMENT | OF_A_COMPARISON or (ROOT / path).exists(), span


@pytest.mark.parametrize('name', READMES)
def test_commands(name):
    commands = [line for block in blocks(name, 'bash') for line in block.split('\n')]
    commands += [span for span in spans(read(name)) if span.startswith(('python ', 'pip '))]
    for command in commands:
        if command.startswith(tools.PROGRAM + ' '):
            tools.build_parser().parse_args(shlex.split(command[len(tools.PROGRAM):]))
        for script in re.findall(r'(?:python|--nproc_per_node=2) (\S+\.py)', command):
            assert (ROOT / script).exists()
            options = read(script) + read('benchmarks/common.py') + read('lzero_kvcache/training/cli.py')
            for option in re.findall(r' (--[\w-]+)', command.split(script)[1]):
                assert f"'{option}'" in options, command
        for config_file in re.findall(r'--config (\S+\.py)', command):
            assert any((ROOT / folder / config_file).exists() for folder in ('configs', 'zoo_configs'))


@pytest.mark.parametrize('name', PAGES + ['docs/results.md'])
def test_lines_are_short(name):
    """Tables apart, which cannot be broken."""
    fences = re.compile(r'^```.*?^```$', re.DOTALL | re.MULTILINE)
    lines = fences.sub('', read(name)).split('\n')
    assert not [line for line in lines if len(line) > 120 and not line.startswith('|')]


# ---- docs/design.md -------------------------------------------------------------------------------------------------

def imports(path):
    """The package's own modules that a file imports, and the libraries."""
    own, libraries = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[:-1]
            base = package[:len(package) - node.level + 1] if node.level else ()
            names = base + tuple((node.module or '').split('.') if node.module else ())
            if names[0] != 'lzero_kvcache':
                libraries.add(names[0])
            elif len(names) > 1:
                own.add(names[1])
            else:
                own |= {alias.name if (PACKAGE / f'{alias.name}.py').exists() else '__init__' for alias in node.names}
        elif isinstance(node, ast.Import):
            libraries |= {alias.name.split('.')[0] for alias in node.names}
    return own, {library for library in libraries if not _is_standard(library)}


def _is_standard(library):
    if hasattr(sys, 'stdlib_module_names'):
        return library in sys.stdlib_module_names
    spec = importlib.util.find_spec(library)
    return spec is None or 'site-packages' not in (spec.origin or '')


class TestRooms:
    ROOMS = [[row[0], spans(row[1]), spans(row[2])] for row in next(
        table[1:] for table in tables('docs/design.md') if table[0][0] == 'room'
    )]

    def files(self, module):
        folder = PACKAGE / module
        return sorted(folder.glob('*.py')) if folder.is_dir() else [PACKAGE / f'{module}.py']

    def test_every_module_is_in_one_room(self):
        modules = [module for _, modules, _ in self.ROOMS for module in modules]
        there = {path.stem for path in PACKAGE.glob('*.py')} - {'__init__'} | FOLDERS
        assert sorted(modules) == sorted(there)

    def test_imports_run_one_way(self):
        above = set()
        for room, modules, _ in self.ROOMS:
            for module in modules:
                for path in self.files(module):
                    own = imports(path)[0] - ({'__init__'} if module == 'training' else set())
                    assert own <= above | set(modules), (room, path.name)
            above |= set(modules)

    def test_there_are_no_circles(self):
        for _, modules, _ in self.ROOMS:
            left = {module: imports(PACKAGE / f'{module}.py')[0] & set(modules)
                    for module in modules if module not in FOLDERS}
            while left:
                free = [module for module, needed in left.items() if not needed & set(left)]
                assert free, left
                for module in free:
                    del left[module]

    def test_libraries(self):
        for room, modules, libraries in self.ROOMS:
            used = set().union(*(imports(path)[1] for module in modules for path in self.files(module)))
            assert sorted(used) == sorted(libraries), room

    def test_storage_apart_no_room_of_bookkeeping_knows_tensors(self):
        for room, _, libraries in self.ROOMS:
            if room in ('configuration', 'numbers', 'pool', 'manager'):
                assert not {'torch', 'lzero'} & set(libraries)

    def test_two_modules_of_training_reach_into_lightzero(self):
        knowing = [path.name for path in self.files('training') if 'lzero' in imports(path)[1]]
        assert knowing == ['data_parallel.py', 'lightzero.py']


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
        assert manager._pages.used == 2

    def test_what_a_context_reads_as(self):
        halves = {page: name.split() for name, page in zip(self.drawn(), ('P0', 'P1', 'P2', 'P4', 'P3'))}
        for _, _, _, pages, reads, count in self.CONTEXTS:
            tokens = [token for page in pages.split() for token in halves[page]]
            assert ['--'] + tokens[1:] == reads.split()
            assert len(tokens) - 1 == int(count) <= self.CONTEXT_LENGTH - 3

    def drawn(self):
        drawing = next(block for block in blocks('docs/design.md', '') if 'root 0' in block)
        return [' '.join(pair) for pair in re.findall(r'\| (--|\w\d) \| (\w\d) \|', drawing)]

    def test_what_is_said_of_its_size(self):
        copies, held = len(self.CONTEXTS) * self.CONTEXT_LENGTH, 2 * len(self.CONTEXTS)
        assert f'Five whole copies would hold {copies} tokens; the pages hold {held}.' in read('docs/design.md')


def test_the_promises_name_tests_that_exist():
    named = [span for span in spans(read('docs/design.md')) if span.startswith('tests/') and '::' in span]
    assert len(named) > 10
    for test in named:
        path, *names = test.split('::')
        scope = ast.parse(read(path)).body
        for part in names:
            [node] = [node for node in scope if getattr(node, 'name', None) == part]
            scope = node.body
