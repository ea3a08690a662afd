"""LightZero's own functions with other names in their globals, without a change to any module of LightZero.

A copy of the function is made for one call, so that two policies or two threads never see each other's names.
"""
import types
from typing import Any, Callable


def with_globals(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """A copy of a function, or of a bound method, that finds other objects under some global names."""
    if isinstance(function, types.MethodType):
        return types.MethodType(with_globals(function.__func__, **names), function.__self__)
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__,
        function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
