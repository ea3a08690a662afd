"""
What pycolab 1.2, the newest there is, needs to run on Python 3.10 and numpy 1.24. Importing this mends it; where it is
not installed, the environment says so.
"""
import collections.abc
from typing import Sequence

import numpy as np

# pycolab looks for these in their old place.
collections.Mapping, collections.Sequence = collections.abc.Mapping, collections.abc.Sequence


def ascii_art_to_uint8_nparray(art: Sequence[str]) -> np.ndarray:
    """
    Overview:
        Lines of a drawing as characters; pycolab's own stacks a generator, which numpy no longer takes.
    Arguments:
        - art (:obj:`Sequence[str]`): ``H`` lines of ``W`` ASCII characters.
    Returns:
        - array (:obj:`np.ndarray`): ``[H, W]``, uint8.
    """
    return np.array([list(line.encode('ascii')) for line in art], dtype=np.uint8)


try:
    from pycolab import ascii_art
except ImportError:
    pass
else:
    ascii_art.ascii_art_to_uint8_nparray = ascii_art_to_uint8_nparray
