"""
Lock files: a training holds its folder, an experiment its own, so that no second one writes there. The lock is the
operating system's, and ends with the process, however that ends.
"""
import contextlib
import errno
import fcntl
import io
import logging
import os
import socket
import time
from multiprocessing import util
from typing import IO, Iterator, Sequence

from .config import ConfigError

logger = logging.getLogger(__name__)

TRAINING = 'train.lock'
TRAINED = '{} is being trained by {{who}}; wait for it, or end it'
# A process that only checks a lock holds it for a moment, which a training that begins must wait out.
PATIENCE_SECONDS = 0.5
# What a file system without locks says.
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


@contextlib.contextmanager
def held(path: str, refusal: str) -> Iterator[IO[str]]:
    """
    A context in which this process holds a lock file, and with it those that inherit the descriptor. If others hold it,
    a ``ConfigError`` names them as ``{who}``. The file stays: a name that is removed could be held twice.
    """
    try:
        file = open(path, 'a+', encoding='utf-8')
    except OSError as error:
        raise ConfigError(f'{path} cannot be written ({error.strerror})') from error
    with file:
        # Environments in processes of their own inherit it as well, and may outlive a training that is killed.
        util.register_after_fork(file, io.TextIOWrapper.close)
        try:
            _lock(file, fcntl.LOCK_EX, refusal)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning('%s cannot be locked (%s): see to it that nothing else writes there',
                           os.path.dirname(path) or '.', error.strerror)
        tell_holders(file, [os.getpid()])
        yield file


@contextlib.contextmanager
def training_in(folder: str, shown: str) -> Iterator[None]:
    """A context in which this process, and no other, trains in a folder."""
    with held(os.path.join(folder, TRAINING), TRAINED.format(shown)):
        yield


def check_not_trained_in(folder: str, shown: str) -> None:
    """Refuse a folder in which a process trains; nothing is written."""
    with contextlib.suppress(OSError), open(os.path.join(folder, TRAINING), encoding='utf-8') as file:
        _lock(file, fcntl.LOCK_SH, TRAINED.format(shown))


def tell_holders(file: IO[str], processes: Sequence[int]) -> None:
    """Write into a lock file which processes hold it; if the disk is full, it names none."""
    with contextlib.suppress(OSError):  # not through the file's buffer, which would be written again when it closes
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), ' '.join([socket.gethostname(), *map(str, processes)]).encode())


def _lock(file: IO[str], how: int, refusal: str) -> None:
    """Lock a file, or refuse where another process holds it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if how == fcntl.LOCK_SH or time.monotonic() > deadline:
                raise ConfigError(refusal.replace('{who}', _holders(file))) from None
        time.sleep(0.01)


def _holders(file: IO[str]) -> str:
    """The processes that a lock file names and that still run, as far as this host can see."""
    file.seek(0)
    host, _, processes = file.read().partition(' ')
    here = host == socket.gethostname()
    running = [process for process in processes.split() if not here or _runs(int(process))]
    if not running:
        return 'another process'
    return f'process{"es" * (len(running) > 1)} {", ".join(running)}' + (f' on {host}' if not here else '')


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
