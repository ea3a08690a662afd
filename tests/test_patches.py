"""What a training replaces outside of this package: all of it is in one table, is there, and comes back."""
import ast
import importlib
import os
import re
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from builders import Worker, make_policy
from lzero.policy.unizero import UniZeroPolicy
from small_models import ON_MAIN

from lzero_kvcache.host import patches
from lzero_kvcache.host.patches import TABLE, applied, with_globals

PACKAGE = Path(patches.__file__).parents[1]
TARGETS = [target for patch in TABLE.values() for target in patch.targets]
COPIED = [name for name, patch in TABLE.items() if patch.targets[0].startswith('copy of ')]


def state(target):
    """What is at a target now."""
    kind, _, name = target.partition(':')
    if kind == 'signal':
        return signal.getsignal(getattr(signal, name))
    if kind == 'environ':
        return os.environ.get(name)
    if kind == 'descriptor':
        return os.fstat(int(name)).st_ino
    if kind == 'directory':
        return os.getcwd()
    if kind == 'sys.path':
        return list(sys.path)
    if kind == 'threads':
        return torch.get_num_threads()
    owner = importlib.import_module(kind)
    for part in name.split('.'):
        owner = getattr(owner, part)
    return owner


def replacement(target):
    kind = target.partition(':')[0]
    if kind == 'signal':
        return lambda *_: None  # what starts the tests may have them ignored
    if kind == 'environ':
        return '1'
    if kind == 'descriptor':
        return os.open(os.devnull, os.O_WRONLY)
    if kind == 'directory':
        return '/'
    if kind == 'sys.path':
        return '/somewhere'
    if kind == 'threads':
        return torch.get_num_threads() + 1
    return (lambda: None).__code__ if target.endswith('__code__') else object()


@pytest.mark.parametrize('name', sorted(TABLE.keys() - COPIED))
@pytest.mark.parametrize('fails', [False, True])
def test_each_is_replaced_and_comes_back(name, fails, capfd):
    before = [state(target) for target in TABLE[name].targets]
    made = replacement(TABLE[name].targets[0])
    try:
        with applied(**{name: lambda original: made}):
            during = [state(target) for target in TABLE[name].targets]
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert all(now != was for now, was in zip(during, before))
    assert [state(target) for target in TABLE[name].targets] == before


@pytest.mark.parametrize('target', [target for name in COPIED for target in TABLE[name].targets
                                    if ON_MAIN or ' lzero.policy.unizero_ppo:' not in target])
def test_a_copy_finds_another_name_and_the_module_keeps_its_own(target):
    module, function, name = target[len('copy of '):].split(':')
    original = state(f'{module}:{function}')
    before = original.__globals__.get(name)  # None for a builtin function
    copy = with_globals(original, **{name: 'another'})
    assert copy.__globals__[name] == 'another' and copy.__code__ is original.__code__
    assert original.__globals__.get(name) is before is getattr(importlib.import_module(module), name, None)


def test_nothing_else_can_be_replaced():
    with pytest.raises(AssertionError):
        with_globals(UniZeroPolicy._forward_collect, anything=1)
    with pytest.raises(KeyError):
        with applied(anything=lambda original: None):
            pass


def test_a_copy_can_be_copied_and_keeps_its_name():
    copy = with_globals(with_globals(UniZeroPolicy._forward_collect, np=1), MCTSCtree=2)
    assert (copy.__globals__['np'], copy.__globals__['MCTSCtree']) == (1, 2)
    assert copy.__qualname__ == UniZeroPolicy._forward_collect.__qualname__


def test_what_policies_copy_of_lightzeros_is_in_the_table(monkeypatch, capfd):
    copied = set()

    def noting(function, **names):
        plain = getattr(function, '__func__', function)
        if plain.__module__.startswith('lzero.'):
            copied.update(f'copy of {plain.__module__}:{plain.__qualname__}:{name}' for name in names)
        return with_globals(function, **names)

    for name, module in list(sys.modules.items()):
        if name.startswith('lzero_kvcache.') and vars(module).get('with_globals') is with_globals:
            monkeypatch.setattr(module, 'with_globals', noting)
    policy = make_policy(True, kv_cache_cfg=dict(search='device'))
    for worker in (Worker(policy), Worker(policy, 'eval')):
        worker.forward([0, 1])
    names = {target.rpartition(':')[2] for target in copied}
    assert names >= {'MCTSCtree', 'select_action', 'np'}
    assert ('WorldModel' in names) is not ON_MAIN  # whose models name it by an attribute
    assert copied <= set(TARGETS)


def test_the_table_says_each_target_once():
    assert len(set(TARGETS)) == len(TARGETS)
    for patch in TABLE.values():
        assert patch.replacement and patch.reason and patch.until


# ---- attributes of LightZero's and DI-engine's objects --------------------------------------------------------------

# What begins the names of this package's own objects, of copies of configs, and of what stands in for LightZero's.
OWN = ('cache.', 'cfg.', 'config.', 'given.', 'main_config.', 'result.', 'roots.', 'self.', 'step.', 'world_model_cfg.')
OWN_PARTS = {'watch.learner', 'watch.collector', 'watch.evaluator', 'watch.loaded', 'watch.stopped'}
PARTS_OF_LIGHTZERO = ('self.learner.', 'self.collector.', 'self.evaluator.', 'self.transformer.')
STAND_INS = {'patches.py', 'kept_rows.py', 'shadow.py', 'legacy_reference.py', 'exact_reference.py'}


def attributes_set(path):
    """What a file gives another value, as 'object.attribute', but for objects of its own."""
    source = path.read_text(encoding='utf-8')
    text = partial(ast.get_source_segment, source)
    for node in ast.walk(ast.parse(source)):
        changed = 'self.'
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            changed = text(node)
        elif isinstance(node, ast.Call) and text(node.func) in ('setattr', 'delattr'):
            changed = f'{text(node.args[0])}.' + text(node.args[1]).replace('self.', '').strip("f'")
        if changed not in OWN_PARTS and (changed.startswith(PARTS_OF_LIGHTZERO) or not changed.startswith(OWN)):
            yield changed


def test_the_page_lists_each_attribute_that_is_set():
    page = (PACKAGE.parent / 'docs' / 'patches.md').read_text(encoding='utf-8')
    rows = page[page.index('| attribute |'):].split('\n\n')[0].split('\n')[2:]
    told = [re.findall('`([^`]+)`', row) for row in rows]
    paths = [path for path in (PACKAGE / 'host').glob('*.py') if path.name not in STAND_INS]
    paths += [PACKAGE / name for name in ('run_hooks.py', 'telemetry.py', 'training/watch.py')]
    found = {(changed, path.relative_to(PACKAGE).as_posix()) for path in paths for changed in attributes_set(path)}
    assert found == {(changed, row[-1]) for row in told for changed in row[:-1]}


def imported(tree):
    """The libraries that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split('.')[0]


@pytest.mark.parametrize('path', [path for room in ('training', 'cli') for path in (PACKAGE / room).glob('*.py')],
                         ids=lambda path: path.name)
def test_training_and_cli_know_lightzero_by_the_host_alone(path):
    """They import nothing of it, and replace nothing themselves."""
    source = path.read_text(encoding='utf-8')
    assert not set(imported(ast.parse(source))) & {'lzero', 'ding', 'zoo', 'gym', 'gymnasium'}
    assert not re.search(r'setattr\(|__code__|__dict__|import_module|signal\.signal|sys\.modules|sys\.path'
                         r'|sys\.std(out|err) = |os\.environ\[|set_num_threads', source)
