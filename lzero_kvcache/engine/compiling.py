"""Compiling functions by numba, which is imported with the first of them, not with the package."""
import importlib.util
import logging
from typing import Any, Optional, TypeVar

Function = TypeVar('Function')


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
