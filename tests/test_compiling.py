"""Compiled functions in a folder: compiled once, told of, compiled anew where sources differ, whole or not there."""
import contextlib
import importlib.util
import io
import logging
import os
import re
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import List

import pytest
from forks import import_what_compiling_imports, in_forks

from lzero_kvcache.engine.compiling import entry, why_not_compiled

pytestmark = pytest.mark.skipif(importlib.util.find_spec('numba') is None, reason='needs numba')

#: Compiles a small function as the simulation is compiled, and says what it computed, how often and what was logged.
PROGRAM = '''
    import logging, sys
    logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format='%(name)s %(levelname)s %(message)s')
    from lzero_kvcache.engine import compiling

    def add_one(x):
        return x + 1

    compiled = compiling.entry(add_one)
    print('answer', compiled(41), 'of', len(compiled.overloads))
'''


def run(cache: Path, program: str = PROGRAM) -> str:
    """What a process says that keeps compiled functions in ``cache``."""
    [said] = at_once(cache, program)
    return said


def at_once(cache: Path, *programs: str) -> List[str]:
    """The same of several, forks of this process."""
    import_what_compiling_imports()

    def answer(program: str) -> str:
        os.environ['NUMBA_CACHE_DIR'] = str(cache)
        module = sys.modules['__main__'] = ModuleType('__main__')
        logging.getLogger().handlers.clear()
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(textwrap.dedent(program), vars(module))
        return said.getvalue()

    answers = in_forks({str(number): partial(answer, program) for number, program in enumerate(programs)})
    for said in answers.values():
        assert 'answer 42 of 1' in said, said
    return list(answers.values())


def run_anew(cache: Path, program: str = PROGRAM) -> str:
    """What a new process says that has only as much of the package as compiling needs: importing LightZero takes
    seconds."""
    package = Path(__file__).resolve().parent.parent / 'lzero_kvcache'
    stub = f'''
        import sys, types
        package = types.ModuleType('lzero_kvcache')
        package.__path__ = [{str(package)!r}]
        sys.modules['lzero_kvcache'] = package
    '''
    code, environment = textwrap.dedent(stub) + textwrap.dedent(program), {**os.environ, 'NUMBA_CACHE_DIR': str(cache)}
    done = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env=environment, timeout=120, check=False)
    assert done.returncode == 0 and 'answer 42 of 1' in done.stdout, done.stdout
    return done.stdout


def test_functions_are_compiled_once_for_a_machine(tmp_path: Path) -> None:
    first = run_anew(tmp_path)
    assert first.count('Compiling searches (add_one) once for this machine') == 1
    assert 'numba.core' not in first  # whose log is long, and LightZero's root logger shows everything
    assert 'Compiling' not in run(tmp_path)
    assert len(list(tmp_path.rglob('*.bin'))) == 1


def test_each_compilation_is_told_of(tmp_path: Path) -> None:
    """Of another function, and of another kind of arguments: each is waited for."""
    more = PROGRAM.replace("print('answer'", """def add_two(x):
        return x + 2

    compiling.entry(add_two)(40)
    compiled(41.)
    print('answer'""").replace('len(compiled.overloads)', 'len(compiled.overloads) - 1')
    said = run(tmp_path, more)
    assert said.count('Compiling searches (add_two) once for this machine') == 1
    assert said.count('Compiling searches (add_one) once for this machine') == 2
    assert 'Compiling' not in run(tmp_path, more)


def test_other_sources_are_compiled_anew(tmp_path: Path) -> None:
    """Of the function's own room, whichever that is, and of what all compiled functions call."""
    room, kept = tmp_path / 'room', tmp_path / 'kept'
    room.mkdir()
    (room / 'called.py').write_text('')
    (room / 'adding.py').write_text('def add_one(x):\n    return x + 1\n')
    imported = f'sys.path.append({str(room)!r})\n    from adding import add_one\n\n'
    program = re.sub(r'def add_one.*?\n\n', imported, PROGRAM, flags=re.DOTALL)
    for content, is_compiled in (('', True), ('', False), ('edited = 1', True), ('edited = 1', False)):
        (room / 'called.py').write_text(content)
        assert ('Compiling' in run(kept, program)) == is_compiled
    other = 'compiling.hash_of = lambda folders: f"of {len(folders)}"\n    compiled ='
    edited = program.replace('compiled =', other)
    assert 'Compiling' in run(kept, edited)
    assert [path.name for path in kept.rglob('of 3')]


def test_sources_are_read_once_for_all_functions_of_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    entry(lambda x: x)
    read = []
    monkeypatch.setattr(Path, 'read_bytes', lambda path: read.append(path) or b'')
    entry(lambda x: x + 1)
    assert not read


def test_a_function_of_the_same_name_is_another(tmp_path: Path) -> None:
    """As one that was edited in a notebook."""
    run(tmp_path)
    assert 'Compiling' in run(tmp_path, PROGRAM.replace('x + 1', 'x + 2').replace('(41)', '(40)'))


def test_a_closure_is_refused() -> None:
    """Its code is the same whatever it closes over."""
    added = 1

    def add(x):
        return x + added

    with pytest.raises(ValueError, match='add is a closure over added, which would be compiled in: pass it instead'):
        entry(add)


def test_two_processes_at_once(tmp_path: Path) -> None:
    at_once(tmp_path, PROGRAM, PROGRAM)
    assert 'Compiling' not in run(tmp_path)
    assert len(list(tmp_path.rglob('*'))) == 3  # two folders and one file: nothing half-written is left


def test_a_file_that_is_not_whole_is_replaced(tmp_path: Path) -> None:
    run(tmp_path)
    [kept] = tmp_path.rglob('*.bin')
    for broken in (b'', kept.read_bytes()[:200]):
        kept.write_bytes(broken)
        assert 'Compiling searches (add_one) anew' in run(tmp_path)
        assert 'Compiling' not in run(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """As where the user may not write; root may, so a file stands in its way."""
    (tmp_path / 'taken').write_text('')
    said = run(tmp_path / 'taken')
    assert 'is compiled for this process alone' in said and 'NUMBA_CACHE_DIR' in said


def test_a_full_disk(tmp_path: Path) -> None:
    full = PROGRAM.replace('def add_one', '''import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    def add_one''')
    assert 'is compiled for this process alone' in run(tmp_path, full)
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]


def test_without_numba_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_compiled() is None
    monkeypatch.setitem(sys.modules, 'numba', None)
    assert 'numba' in why_not_compiled()


def test_numba_is_not_imported_with_the_package() -> None:
    """DI-engine's segment tree compiles itself where numba can be imported, as it always did; that is not ours."""
    code = '''
        import sys
        from lzero_kvcache.engine import compiling, program, step
        print('answer 42 of 1', [name for name in sys.modules if name.startswith('lzero_kvcache.engine')])
        assert 'lzero_kvcache.engine.compiled_step' not in sys.modules
    '''
    assert 'lzero_kvcache.engine.program' in run_anew(Path('unused'), code)
