"""Holds the new system's searches against LightZero's own code while it trains. Joins traces, shadows and tally."""
import logging
import time
from collections import Counter
from typing import Any, Dict, FrozenSet, List, Optional, Sequence

import numpy as np
import torch

from ..config import CacheConfig
from .exact import ExactShadow, Reply
from .legacy import CAUSES, LegacyShadow
from .shadow import position_tables
from .tally import QUANTITIES, Tally, compare
from .trace import Node, Search, answer_of

logger = logging.getLogger(__name__)


class ValidationError(RuntimeError):
    """
    Overview:
        An answer of the new system is another than LightZero's own code gives, and nothing that is known explains it.
    """


class Validator:
    """
    Overview:
        Follows every root inference, and replays every ``validation_freq``-th search whole. It has no weights, draws
        nothing at random, and is nobody's but its world model's: copies of that have none.
    Arguments:
        - options (:obj:`CacheConfig`): With a ``validation`` that is not 'off'.
    """

    def __init__(self, options: CacheConfig) -> None:
        self._options = options
        self._tables: Dict[str, Any] = {}
        self._shadow: Any = None  # from the end of LightZero's constructor on
        self.tally = Tally(options.validation_tol, CAUSES if options.validation == 'legacy' else ())
        self._searches = 0
        self._search: Optional[Search] = None
        self._told = False

    def __reduce__(self) -> Any:
        return type(None), ()

    # ---- what the world model tells --------------------------------------------------------------------------------

    def attach(self, world_model: Any) -> None:
        """
        Overview:
            LightZero's constructor is done, and nothing else has been added yet.
        Arguments:
            - world_model (:obj:`Any`): Whose modules the shadow shares.
        """
        attributes = {name: value for name, value in vars(world_model).items() if value is not self}
        self._shadow = (LegacyShadow if self._options.validation == 'legacy' else ExactShadow)(attributes)
        self._shadow.set_tables(self._tables)

    def open(self, mode: str, env_ids: List[int]) -> None:
        """
        Overview:
            A search is about to start.
        """
        self._searches += 1
        self._search = Search(mode, env_ids, self._searches % self._options.validation_freq == 0)

    def close(self) -> None:
        """
        Overview:
            The search has ended, well or not.
        """
        self._search = None

    def root(self, last_obs: Any, last_actions: Sequence[Any], obs: Any, timesteps: np.ndarray, lost: np.ndarray,
             outputs: Sequence[Any]) -> None:
        """
        Overview:
            Note the root inference.
        Arguments:
            - last_obs (:obj:`torch.Tensor`): The last observations ``[B, ...]``.
            - last_actions (:obj:`Sequence`): The last actions ``[B]``, -1 where an episode starts.
            - obs (:obj:`torch.Tensor`): The current observations ``[B, ...]``.
            - timesteps (:obj:`np.ndarray`): ``[B]``.
            - lost (:obj:`np.ndarray`): Rows whose context was not found.
            - outputs (:obj:`Sequence`): As for :func:`answer_of`.
        """
        search = self._search
        if search is not None:
            search.last_obs, search.last_actions, search.obs = last_obs, last_actions, obs
            search.timesteps, search.lost = [np.array(timestep) for timestep in timesteps], lost.tolist()
            search.root = answer_of(outputs)

    def node(self, path: np.ndarray, actions: Any, depths: Sequence[int], outputs: Sequence[Any]) -> None:
        """
        Overview:
            Note one simulation of a search by node.
        Arguments:
            - path (:obj:`np.ndarray`): Index in the search path of each row's node ``[B]``.
            - actions (:obj:`np.ndarray`): ``[B]``, or ``[B, A]``.
            - depths (:obj:`Sequence[int]`): What LightZero's tree passes as depth ``[B]``.
            - outputs (:obj:`Sequence`): As for :func:`answer_of`.
        """
        if self._search is not None and self._search.replayed:
            self._search.nodes.append(Node(path, actions, depths, answer_of(outputs)))

    def keyed_node(self, latents: np.ndarray, actions: Any, depths: Sequence[int], outputs: Sequence[Any]) -> None:
        """
        Overview:
            Note one simulation of a search by key. From a latent state that belongs to no node on, a search is not
            replayed.
        Arguments:
            - latents (:obj:`np.ndarray`): The latent state of each row's node ``[B, E]``.
            - actions (:obj:`torch.Tensor`): ``[B]``, or ``[B, A]``.
            - depths (:obj:`Sequence[int]`): ``[B]``.
            - outputs (:obj:`Sequence`): As for :func:`answer_of`.
        """
        if self._search is not None and self._search.replayed:
            path = self._search.find(latents)
            if path is None:
                self._search.replayed = False
            else:
                self.node(path, actions.cpu().numpy(), depths, outputs)

    def precompute(self, world_model: Any) -> None:
        """
        Overview:
            LightZero would make its tables of positions now, as it does first inside its constructor.
        """
        self._tables = position_tables(world_model)
        if self._shadow is not None:
            self._shadow.set_tables(self._tables)

    def forget(self, mode: Optional[str], env_id: Optional[int]) -> None:
        """
        Overview:
            The world model forgot the root contexts of an environment, of a mode, or everything.
        """
        self._shadow.forget(mode, env_id)

    # ---- what the policy tells -------------------------------------------------------------------------------------

    def reset(self, reset: Any, *args: Any, **kwargs: Any) -> None:
        """
        Overview:
            LightZero's policy would reset now; what it resets while it searches, it does when the search is over.
        Arguments:
            - reset (:obj:`Any`): LightZero's own method, bound to its policy, and what it is called with.
        """
        if self._search is None:
            self._shadow.reset(reset, *args, **kwargs)
        else:
            self._search.resets.append(lambda: self._shadow.reset(reset, *args, **kwargs))

    @torch.no_grad()
    def check(self, world_model: Any, actions: Sequence[Any]) -> None:
        """
        Overview:
            Hold the search that has just been made against the shadow's.
        Arguments:
            - world_model (:obj:`Any`): The one that searched.
            - actions (:obj:`Sequence`): What the environments do now ``[B]``.
        Raises:
            - ValidationError: An unexplained difference, and ``validation_action`` is 'raise'.
        """
        search = self._search
        if search is None or search.root is None or world_model.training:  # with dropout nothing is the same twice
            return
        start = time.perf_counter()
        search.actions = actions
        replies = self._shadow.follow(world_model, search)
        self._compare(search, replies)
        self.tally.searches += search.replayed
        self.tally.lost = self._shadow.lost
        self.tally.seconds += time.perf_counter() - start

    def _compare(self, search: Search, replies: List[Reply]) -> None:
        assert search.root is not None
        answered = [reply for reply in replies if reply.answer is not None]
        for reply in replies[len(answered):]:
            self.tally.add_failure(reply.causes)
        if answered:
            ours = [search.root, *(node.answer for node in search.nodes)]
            differences = compare(ours[:len(answered)], [reply.answer for reply in answered if reply.answer])
            causes = [reply.causes for reply in answered]
            over, unexplained = self.tally.add(differences, causes)
            self._report(search, differences, causes, over, unexplained)

    def _report(self, search: Search, differences: Dict[str, np.ndarray], causes: List[List[FrozenSet[str]]],
                over: np.ndarray, unexplained: np.ndarray) -> None:
        options, is_wrong = self._options, bool(unexplained.any())
        if is_wrong and options.validation_action == 'raise':
            raise ValidationError(
                f'kv_cache_cfg.validation={options.validation!r}: {_worst(search, differences, unexplained)}, more '
                f'than kv_cache_cfg.validation_tol={options.validation_tol:g}'
            )
        if not search.replayed and (self._told or not is_wrong):
            return
        self._told |= is_wrong
        counts = Counter(cause for place in map(tuple, np.argwhere(over)) for cause in causes[place[0]][place[1]])
        counts['unexplained'] = int(unexplained.sum())
        line = f'Validation {options.validation!r}, search {self._searches}: {int(over.sum())} of {over.size} rows ' \
               f'over {options.validation_tol:g}'
        if over.any():
            line += f' ({", ".join(f"{cause} {count}" for cause, count in counts.most_common() if count)}); the ' \
                    f'largest: {_worst(search, differences, unexplained if is_wrong else over)}'
        shown = over.any() or not self.tally.searches  # the first one shows that there is somebody who looks
        logger.log(logging.WARNING if is_wrong else logging.INFO if shown else logging.DEBUG, line)


def _worst(search: Search, differences: Dict[str, np.ndarray], among: np.ndarray) -> str:
    """Where and by how much an answer differs most."""
    stacked = np.where(among, np.stack([differences[name] for name in QUANTITIES]), np.nan)
    quantity, index, row = map(int, np.unravel_index(np.nanargmax(stacked), stacked.shape))
    node = 'the root' if index == 0 else f'simulation {index}'
    return f'in {search.mode}, environment {search.env_ids[row]}, step {search.timesteps[row]}, {node}: ' \
           f'{QUANTITIES[quantity]} differs by {stacked[quantity, index, row]:.2g}'
