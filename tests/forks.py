"""Other processes: forks of one that has imported the heavy libraries once, and the environment of new ones."""
import json
import os
import signal
import sys
import traceback
from typing import Any, Callable, Dict

DIED = {'error': 'died'}
"""What stands for the result of a fork that was killed."""


def environment(*folders: Any, **variables: str) -> Dict[str, str]:
    """The variables of a new process that imports from some folders, and then from wherever this one is told to."""
    path = [*map(str, folders), *filter(None, [os.environ.get('PYTHONPATH')])]
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(path), **variables}


def import_what_compiling_imports() -> None:
    """With the first compiled function; here, once for all forks."""
    from numba.core.registry import cpu_target
    cpu_target.target_context.refresh()
    cpu_target.typing_context.refresh()


def in_forks(functions: Dict[str, Callable[[], Any]]) -> Dict[str, Any]:
    """
    Run every function in a fork of its own, all at once.
Returns:
    - results (:obj:`Dict[str, Any]`): What each returned, through JSON.
    """
    pipes = {}
    for name, function in functions.items():
        receive, send = os.pipe()
        if os.fork() == 0:
            os.close(receive)
            _answer(function, send)
        os.close(send)
        pipes[name] = receive
    results = {}
    for name, pipe in pipes.items():
        with os.fdopen(pipe) as stream:
            results[name] = json.loads(stream.read() or json.dumps(DIED))
        os.wait()
    return results


def _answer(function: Callable[[], Any], pipe: int) -> None:
    """Never returns, so that a fork does not go on with its parent's work; one that hangs is ended."""
    signal.alarm(400)
    try:
        answer = function()
    except BaseException:
        answer = {'error': traceback.format_exc()}
    with os.fdopen(pipe, 'w') as stream:
        stream.write(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)
