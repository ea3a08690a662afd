"""The rooms of the package: who may import whom. The table in docs/design.md is read, and all files as they are.

Every import counts: those inside of functions and under TYPE_CHECKING too. What is imported by a name that only the
running program knows is listed here by hand, and the list is complete.
"""
import ast
import importlib.util
import re
import sys
import sysconfig
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Set, Tuple

import pytest

from lzero_kvcache.host.patches import TABLE

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'lzero_kvcache'
# The command's options stand beside the package, so that they can be read without importing it.
OPTIONS = ROOT / 'lzero_kvcache_options.py'
FILES = [OPTIONS, *sorted(PACKAGE.rglob('*.py'))]
FOLDERS = sorted({path.parent for path in FILES} - {PACKAGE, ROOT})
# Files that Python runs by `-m`: they hand over to the command line, and nothing imports them.
PROGRAMS = {'__main__.py'}
# Imports of modules by name, by the function that makes them.
DYNAMIC = {
    # numba, if it is installed; and what it has compiled of this room, from its file
    'engine/compiling.py': {'find_spec', 'loads'},
    'engine/kernel_check.py': {'find_spec'},  # Triton, if it is installed
    # import_names of a config's environment and model; a policy of LightZero's
    'host/building.py': {'find_spec', 'import_module'},
    'host/patches.py': {'import_module'},  # the modules of TABLE
    'lzero_kvcache_options.py': {'find_spec'},  # where packages are, which are not imported
    'loading.py': {'import_module'},  # import_names of a config's policy
    'telemetry.py': {'import_module'},  # the module beside a tensorboard writer's, which is torch's or tensorboardX's
    'training/config_file.py': {'exec'},  # config files
}
IMPORTING = {
    '__import__', 'exec_module', 'find_spec', 'import_module', 'load_module', 'module_from_spec', 'run_module',
    'run_path', 'spec_from_file_location', 'exec', 'eval',
}
# Modules of the package that are started by name, in processes of their own.
STARTED = {'training/processes.py': {'lzero_kvcache_options'}}
# What these rooms may not import, whatever docs/design.md says.
FORBIDDEN = {
    'configuration': {'torch', 'lzero', 'zoo'},
    'cache': {'torch', 'lzero', 'zoo', 'ding'},
    'engine': {'lzero', 'zoo', 'ding'},
    'search': {'lzero', 'zoo', 'ding'},
    'validation': {'lzero', 'zoo', 'ding'},
    'telemetry': {'lzero', 'zoo'},
    'training': {'lzero', 'zoo', 'ding', 'gym', 'gymnasium'},
    'info': {'lzero', 'zoo', 'ding', 'gym', 'gymnasium'},
    'comparison': {'torch', 'lzero', 'zoo', 'ding'},
    'cli': {'torch', 'lzero', 'zoo', 'ding', 'numpy'},
}


class Room(NamedTuple):
    name: str
    modules: List[str]  # folders and files of the package's top level
    libraries: Set[str]


def rooms() -> List[Room]:
    """The table of docs/design.md, from the room that imports none to the one that none imports."""
    page = (ROOT / 'docs' / 'design.md').read_text(encoding='utf-8')
    lines = page[page.index('| room |'):].split('\n\n')[0].split('\n')[2:]
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    return [Room(name, _spans(modules), set(_spans(libraries))) for name, modules, _, _, libraries in cells]


def _spans(text: str) -> List[str]:
    return re.findall(r'`([^`]+)`', text)


ROOMS = rooms()


def name_of(path: Path) -> str:
    return path.relative_to(ROOT if path == OPTIONS else PACKAGE).as_posix()


def top_of(path: Path) -> str:
    """The folder or file of the package's top level that a file is in, or is."""
    return name_of(path).split('/')[0].replace('.py', '')


def imports(path: Path) -> Iterator[Tuple[str, ...]]:
    """Every module, or name of a package, that a file imports, with its package spelled out; but for those by which
    the command's ``main`` hands over."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    if path == OPTIONS:
        tree.body.remove(command(tree))
    yield from imports_of(tree, path)


def command(tree: ast.Module) -> ast.stmt:
    """``main`` of the options."""
    [main] = [node for node in tree.body if getattr(node, 'name', '') == 'main']
    return main


def imports_of(tree: ast.AST, path: Path) -> Iterator[Tuple[str, ...]]:
    here = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split('.')) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[:len(here) - node.level + 1] if node.level else ()
            base += tuple(node.module.split('.')) if node.module else ()
            yield from (base + (alias.name,) for alias in node.names)


def own_imports(path: Path) -> Set[str]:
    """Files of the package that a file imports."""
    found = set()
    for parts in imports(path):
        if parts[0] == 'lzero_kvcache':
            found.add(_file_of(parts[1:]))
        elif parts[0] == OPTIONS.stem:
            found.add(OPTIONS.name)
    return found


def _file_of(parts: Tuple[str, ...]) -> str:
    """The file that has a name, which may be that of a module, a package, or something in one."""
    for end in range(len(parts), -1, -1):
        for candidate in ('/'.join(parts[:end]) + '.py', '/'.join((*parts[:end], '__init__.py'))):
            if (PACKAGE / candidate).is_file():
                return candidate
    raise AssertionError(parts)


def libraries(path: Path) -> Set[str]:
    return {parts[0] for parts in imports(path)
            if parts[0] not in ('lzero_kvcache', OPTIONS.stem) and not _is_standard(parts[0])}


def _is_standard(library: str) -> bool:
    if hasattr(sys, 'stdlib_module_names'):
        return library in sys.stdlib_module_names
    if library in sys.builtin_module_names:
        return True
    origin = getattr(importlib.util.find_spec(library), 'origin', None) or ''
    is_there = origin.startswith(sysconfig.get_path('stdlib')) and 'site-packages' not in origin
    return is_there or origin in ('built-in', 'frozen')


def files_of(room: Room) -> List[Path]:
    return [path for path in FILES if top_of(path) in room.modules and name_of(path) not in PROGRAMS]


def test_every_file_is_in_one_room():
    named = [module for room in ROOMS for module in room.modules]
    assert sorted(named) == sorted({top_of(path) for path in FILES} - {'__init__', '__main__'})


def test_imports_run_one_way():
    allowed: Set[str] = set()
    for room in ROOMS:
        allowed |= set(room.modules)
        for path in files_of(room):
            assert tops_of(own_imports(path)) <= allowed, name_of(path)


def tops_of(names: Set[str]) -> Set[str]:
    return {name.split('/')[0].replace('.py', '') for name in names}


def test_the_command_hands_over_to_the_command_line_alone():
    tree = ast.parse(OPTIONS.read_text(encoding='utf-8'))
    assert set(imports_of(command(tree), OPTIONS)) == {('lzero_kvcache', 'cli', 'commands', 'run')}


def test_comparison_knows_what_runs_leave_and_nothing_of_what_made_them():
    used = set().union(*(own_imports(path) for path in FILES if top_of(path) == 'comparison'))
    assert tops_of(used) == {'comparison', 'config', 'run_files', 'text'}


def test_nothing_imports_a_program():
    assert not {name for path in FILES for name in own_imports(path)} & PROGRAMS
    for program in PROGRAMS:
        assert own_imports(PACKAGE / program) == {OPTIONS.name}


def test_there_are_no_circles():
    left = {name_of(path): own_imports(path) - {name_of(path), '__init__.py'} for path in FILES}
    while left:
        free = [name for name, needed in left.items() if not needed & set(left)]
        assert free, left
        for name in free:
            del left[name]


def test_only_the_host_names_attributes_of_lightzeros():
    names = ('_k_cache', '_keys_values', 'shared_pool', 'past_kv_cache', 'mcts_ctree', '_total_envstep_count',
             '_max_episode_return', 'RECURRENT_SLOTS')
    found = [(name_of(path), name) for path in FILES if top_of(path) != 'host' for name in names
             if re.search(rf'\b{name}', path.read_text(encoding='utf-8'))]
    assert not found


def test_a_training_does_not_know_how_the_cache_or_lightzeros_workers_work():
    names = (r'policy\._', r'\.slab', 'page_capacity', r'manager\.width',
             '_output_log', 'log_buffer', 'sync_gradients', 'get_num_of_')
    found = [(name_of(path), name) for path in FILES if top_of(path) == 'training' for name in names
             if re.search(name, path.read_text(encoding='utf-8'))]
    assert not found


@pytest.mark.parametrize('room', ROOMS, ids=lambda room: room.name)
def test_libraries(room):
    used = {library: name_of(path) for path in files_of(room) for library in sorted(libraries(path))}
    assert set(used) == room.libraries, used
    assert not set(used) & FORBIDDEN.get(room.name, set()), used


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda path: path.name)
def test_each_room_says_what_it_knows_and_what_it_must_not(folder):
    said = ast.get_docstring(ast.parse((folder / '__init__.py').read_text(encoding='utf-8')))
    assert re.search(r'\bknows\b', said, re.IGNORECASE)
    assert re.search(r'\bmust not\b', said, re.IGNORECASE)


# ---- imports by name ------------------------------------------------------------------------------------------------

def calls_by_name(path: Path) -> Set[str]:
    """Functions that import what they are told, pickle's reader among them, as far as a file uses them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Attribute):
            is_pickle = isinstance(node.value, ast.Name) and node.value.id == 'pickle'
            if node.attr in IMPORTING - {'eval'} or (is_pickle and node.attr in ('load', 'loads')):
                found.add(node.attr)
        elif isinstance(node, ast.Name) and node.id in IMPORTING:
            found.add(node.id)
    return found


def test_dynamic_imports_are_listed():
    assert {name_of(path): calls for path in FILES for calls in [calls_by_name(path)] if calls} == DYNAMIC


def test_they_import_none_of_the_package():
    """The modules of TABLE are others'; a config's names are what it says; the rest is numba's and tensorboard's."""
    targets = [target for patch in TABLE.values() for target in patch.targets]
    assert targets
    assert not [target for target in targets if 'lzero_kvcache' in target]


def test_modules_that_are_started_by_name():
    found: Dict[str, Set[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and re.fullmatch(r'lzero_kvcache(_options|(\.\w+)+)', text):
                found.setdefault(name_of(path), set()).add(text)
    assert found == STARTED
    for names in STARTED.values():
        for name in names:
            assert "if __name__ == '__main__'" in (PACKAGE.parent / (name.replace('.', '/') + '.py')).read_text()
