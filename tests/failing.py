"""Failures at every point of a call: what a plugin's function calls raises instead of running."""
import builtins
import sys
import threading
from collections import deque
from contextlib import contextmanager

from lzero_kvcache import cache


class Failure(Exception):
    """What an operation dies of."""


@contextmanager
def failing(point, *files):
    """
    The call number ``point`` that code of the cache (or of the files) makes or receives raises ``Failure``; with None
    or beyond the last call, none does. Methods of lists and of locks and builtins such as ``len`` are spared, and what
    makes and destroys an object: the first only assigns, and what the second raises Python ignores. Yields a list that
    holds the point once it has failed.
    """
    failed, rooms, calls = [], (*cache.__path__, *files), 0

    def before_call(frame, event, called):
        nonlocal calls
        if event not in ('call', 'c_call') or not frame.f_code.co_filename.startswith(rooms):
            return
        owner = getattr(called, '__self__', None)
        if event == 'c_call' and (owner is builtins or isinstance(owner, (list, deque, type(threading.RLock())))):
            return
        callers = frame
        while callers is not None:
            if callers.f_code.co_name in ('__init__', '__del__', '<genexpr>'):
                return
            callers = callers.f_back
        calls += 1
        if calls == point:
            failed.append(point)
            raise Failure(f'{frame.f_code.co_name}, {event} {calls}')

    sys.setprofile(None if point is None else before_call)
    try:
        yield failed
    except Failure:
        pass
    finally:
        sys.setprofile(None)
