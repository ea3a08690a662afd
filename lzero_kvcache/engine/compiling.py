"""Compiling functions by numba. This package imports numba with the first of them; DI-engine's ``ding.utils`` has
imported it before, where it is installed.

Functions that Python calls are compiled once for a machine, and kept in a folder.
"""
import functools
import hashlib
import importlib.util
import logging
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any, FrozenSet, Optional, TypeVar

import numpy as np

Function = TypeVar('Function')

logger = logging.getLogger(__name__)

COMPILED_IN = [Path(__file__).parent.parent / room for room in ('engine', 'cache')]
"""Folders whose functions and constants are compiled into those of other rooms."""

ZERO: Any = np.int64(0)
"""A 0 for calls of compiled functions: a literal 0 has another type, for which numba would compile them anew."""


def why_not_compiled() -> Optional[str]:
    """Why nothing can be compiled here, in words for the log; None where it can."""
    if importlib.util.find_spec('numba') is None:
        return 'numba is not installed (pip install numba)'
    try:
        import numba  # noqa: F401
    except Exception as error:  # an unsuitable library may raise anything
        return f'numba cannot be imported: {error}'
    return None


def inner(function: Function) -> Function:
    """Compile a function that only compiled functions call."""
    return compiled(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def inlined(function: Function) -> Function:
    """An inner function that is inlined at each call: passing many arrays takes longer than its work."""
    return compiled(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)


def compiled(function: Any, **options: Any) -> Any:
    """Compile without fast-math: nan stays nan, and sums keep their order."""
    from numba import njit

    noisy = logging.getLogger('numba')
    if noisy.level == logging.NOTSET:  # LightZero sets the root logger to DEBUG, where numba logs each bytecode
        noisy.setLevel(logging.WARNING)
    return njit(nogil=True, error_model='numpy', **options)(function)


def entry(function: Function) -> Function:
    """Compile a function that Python calls, once for a machine. It must be no closure: a kept function
    is found by its code, and that lacks the variables of a closure."""
    plain: Any = getattr(function, 'py_func', function)
    if plain.__closure__:
        names = ', '.join(plain.__code__.co_freevars)
        raise ValueError(f'{plain.__qualname__} is a closure over {names}, which would be compiled in: pass it instead')
    dispatcher: Any = compiled(plain)
    place = getattr(sys.modules[plain.__module__], '__file__', None)
    sources = hash_of(frozenset([*COMPILED_IN, *([Path(place).parent] if place else [])]))
    dispatcher._cache = _kept_on_disk(plain, sources)
    return dispatcher


def folder_of(sources: str) -> Path:
    """The folder of compiled functions, one for each version of their sources."""
    chosen = os.environ.get('NUMBA_CACHE_DIR')
    if chosen:
        base = Path(chosen)
    elif sys.platform == 'darwin':
        base = Path('~/Library/Caches').expanduser()
    else:
        base = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    return base / 'lzero_kvcache' / sources


@functools.lru_cache(maxsize=None)
def hash_of(folders: FrozenSet[Path]) -> str:
    """The hash of all sources in some folders, since numba misses changes in called functions. It is computed once,
    when the first of their functions is defined: later changes of the files are not compiled."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.glob('*.py')):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _kept_on_disk(plain: Any, sources: str) -> Any:
    """A cache for numba to ask. numba's own keeps an index file, in which two processes can overwrite each other's
    entries; here the name of a file is a hash of everything that its contents depend on."""
    import llvmlite
    import numba
    from numba.core.caching import NullCache
    from numba.core.compiler import CompileResult
    from numba.core.serialize import dumps

    name, code = f'{plain.__module__}.{plain.__qualname__}', plain.__code__
    # A notebook can give a function of one name another body.
    body = code.co_code, code.co_names, code.co_consts

    class KeptOnDisk(NullCache):
        def load_overload(self, signature: Any, target: Any) -> Any:
            target.refresh()
            try:
                kept = pickle.loads(self._path(signature, target.codegen()).read_bytes())
                return CompileResult._rebuild(target, *kept)
            except Exception as error:  # not there, not readable, not whole
                where = 'once for this machine' if isinstance(error, FileNotFoundError) else f'anew ({error!r})'
                part = name.rpartition('.')[2]
                logger.info(f'Compiling searches ({part}) {where}, which takes some ten seconds')
                return None

        def save_overload(self, signature: Any, result: Any) -> None:
            path = self._path(signature, result.codegen)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(path, dumps(result._reduce()))
            except OSError as error:
                logger.info(f'{name} is compiled for this process alone: {error}; NUMBA_CACHE_DIR names another folder')

        def _path(self, signature: Any, codegen: Any) -> Path:
            versions = numba.__version__, llvmlite.__version__, sys.version
            parts = name, body, str(signature), codegen.magic_tuple(), *versions
            return folder_of(sources) / (hashlib.sha256(repr(parts).encode()).hexdigest()[:32] + '.bin')

    return KeptOnDisk()


def _write(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
