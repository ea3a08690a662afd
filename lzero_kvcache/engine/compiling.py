"""Compiling functions by numba, and the folder in which compiled functions are kept.

numba is imported with the first function that is compiled, not with the package.
"""
import hashlib
import importlib.util
import logging
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional, TypeVar

logger = logging.getLogger(__name__)

Function = TypeVar('Function')

PACKAGE = Path(__file__).resolve().parent.parent
ROOMS = 'engine', 'search'
"""Rooms with compiled functions. All their sources are hashed, since numba misses changes in functions that are called.
"""


def why_not_compiled() -> Optional[str]:
    """Why nothing can be compiled here, in words for the log; None where it can."""
    if importlib.util.find_spec('numba') is None:
        return 'numba is not installed (pip install numba)'
    try:
        import numba  # noqa: F401
    except Exception as error:  # whatever a library that does not fit raises
        return f'numba cannot be imported: {error}'
    return None


def inner(function: Function) -> Function:
    """Compile a function that only compiled functions call."""
    return _compiled(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def inlined(function: Function) -> Function:
    """An inner function that is inlined at each call: passing many arrays takes longer than its work."""
    return _compiled(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)


def entry(function: Function) -> Function:
    """Compile a function that Python calls, once for a machine. It may be an inner one already."""
    plain: Any = getattr(function, 'py_func', function)
    dispatcher = _compiled(plain)
    dispatcher._cache = _kept_on_disk(f'{plain.__module__}.{plain.__qualname__}')
    return dispatcher


def _compiled(function: Any, **options: Any) -> Any:
    """Compile without fast-math: nan stays nan, and sums keep their order."""
    from numba import njit

    noisy = logging.getLogger('numba')
    if noisy.level == logging.NOTSET:  # LightZero sets the root logger to DEBUG, where numba logs each bytecode
        noisy.setLevel(logging.WARNING)
    return njit(nogil=True, error_model='numpy', **options)(function)


def folder() -> Path:
    """The folder of compiled functions, one for each version of the sources."""
    chosen = os.environ.get('NUMBA_CACHE_DIR')
    if chosen:
        base = Path(chosen)
    elif sys.platform == 'darwin':
        base = Path('~/Library/Caches').expanduser()
    else:
        base = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    from .. import __version__

    return base / 'lzero_kvcache' / f'{__version__}-{SOURCES}'


def _hash_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (PACKAGE / room).glob('*.py')):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


SOURCES = _hash_sources()
"""Hashed at import: this process compiles the sources as they are now, even if the files change later."""


def _kept_on_disk(name: str) -> Any:
    """A cache for numba to ask. numba's own keeps an index file, in which two processes can overwrite each other's
    entries; here the name of a file is a hash of everything that its contents depend on."""
    import llvmlite
    import numba
    from numba.core.caching import NullCache
    from numba.core.compiler import CompileResult
    from numba.core.serialize import dumps

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
            parts = name, str(signature), codegen.magic_tuple(), numba.__version__, llvmlite.__version__, sys.version
            return folder() / (hashlib.sha256(repr(parts).encode()).hexdigest()[:32] + '.bin')

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
