"""
The level of the root logger. LightZero's world model sets it when it is imported, which in LightZero alone is with the
first model; the plugin imports it earlier, and postpones the change of the level.
"""
import contextlib
import logging
from typing import Iterator, List

_put_off: List[int] = []


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Imports that leave the level as it was."""
    root = logging.getLogger()
    before = root.level
    try:
        yield
    finally:
        if root.level != before:
            _put_off.append(root.level)
            root.setLevel(before)


def set_as_lightzero_does() -> None:
    """Set the level once, if that was postponed."""
    while _put_off:
        logging.getLogger().setLevel(_put_off.pop())
