"""Runs functions in forks of a process that has imported the heavy libraries once, and not what is under test."""
import json
import os
import signal
import sys
import traceback
from typing import Any, Callable, Dict


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
            results[name] = json.loads(stream.read() or '{"error": "died"}')
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
