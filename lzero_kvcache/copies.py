"""Parts that are not copied with their owner: each copy of it has fresh ones."""
import threading
from typing import Any


class MadeAnew:
    """A copy of its owner has a new one, made without arguments."""

    def __reduce__(self) -> Any:
        return type(self), ()


class Turns(MadeAnew):
    """Lets one thread in at a time."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a thread may search inside of its own search
