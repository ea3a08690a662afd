"""
A scripted environment and LightZero's real workers around a policy, with notes of every search by environment.

An environment's observations depend on nothing but its script and the step, and its episodes end when its script says,
so that it lives through the same whether it is alone or in a batch. No test lives here.
"""
import contextlib
import io
import logging
import time
from typing import Any, Dict, List, NamedTuple, Sequence
from unittest import mock

import gymnasium
import numpy as np
from builders import compiled, small_cartpole
from ding.envs import BaseEnv, BaseEnvTimestep, create_env_manager
from ding.policy import create_policy
from ding.utils import ENV_REGISTRY
from easydict import EasyDict
from lzero.mcts import UniZeroGameBuffer
from lzero.worker import MuZeroCollector, MuZeroEvaluator, MuZeroSegmentCollector
from seeded_search import seeded_search
from small_models import ON_MAIN, Case, randomise
from tensorboardX import SummaryWriter

from lzero_kvcache.host.tree_search import KeylessSearch

OBS_SHAPE, ACTIONS = 4, 2
#: Lengths of the episodes of each script, in turn.
SCRIPTS = ((3, 5, 4), (7, 2, 6), (4, 4, 9), (9, 3, 2))


@ENV_REGISTRY.register('scripted_lightzero', force_overwrite=True)
class ScriptedEnv(BaseEnv):
    """
    The last observation of an episode is also the first of the next one, since LightZero's segment collector starts an
    episode with the one or with the other. ``cfg`` has the number of the ``script`` and whether ``timesteps`` are told.
    """

    def __init__(self, cfg: Dict[str, Any]) -> None:
        self._script, self._tells = cfg['script'], cfg.get('timesteps', True)
        self._episode, self._step, self._seen = -1, 0, 0
        self._observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS_SHAPE, ), np.float32)
        self._action_space = gymnasium.spaces.Discrete(ACTIONS)
        self._reward_space = gymnasium.spaces.Box(-1., 1., (1, ), np.float32)

    def reset(self) -> Dict[str, Any]:
        self._episode, self._step = self._episode + 1, 0
        return self._observe()

    def step(self, action: Any) -> BaseEnvTimestep:
        self._step, self._seen = self._step + 1, self._seen + 1
        lengths = SCRIPTS[self._script]
        done = self._step == lengths[self._episode % len(lengths)]
        info = dict(eval_episode_return=float(self._step)) if done else {}
        return BaseEnvTimestep(self._observe(), np.array([1.], np.float32), done, info)

    def _observe(self) -> Dict[str, Any]:
        rng = np.random.default_rng([self._script, self._seen])
        return dict(
            observation=rng.normal(size=OBS_SHAPE).astype(np.float32), action_mask=np.ones(ACTIONS, np.int8),
            to_play=-1, timestep=self._step if self._tells else 0
        )

    def seed(self, seed: int, dynamic_seed: bool = True) -> None:
        pass

    def close(self) -> None:
        pass

    @property
    def observation_space(self) -> Any:
        return self._observation_space

    @property
    def action_space(self) -> Any:
        return self._action_space

    @property
    def reward_space(self) -> Any:
        return self._reward_space

    def __repr__(self) -> str:
        return f'ScriptedEnv({self._script})'


class Search(NamedTuple):
    """What one search found for one environment."""
    predicted_value: float
    searched_value: float
    visits: List[int]
    action: int
    timestep: int


class Noted:
    """
    A policy's collect or eval mode that notes every search by environment, and how many had a predecessor.
    """

    def __init__(self, policy: Any, mode: str) -> None:
        self.mode = mode
        self.searches: Dict[int, List[Search]] = {}
        self.batches: List[List[int]] = []
        self.followed = 0
        self._inside: set = set()
        self._mode = getattr(policy, mode + '_mode')
        self.worker_api = self._mode._replace(forward=self._forward, reset=self._reset)

    def _forward(self, *args: Any, **kwargs: Any) -> Dict[int, Any]:
        output = self._mode.forward(*args, **kwargs)
        env_ids = [int(env_id) for env_id in kwargs['ready_env_id']]
        self.batches.append(env_ids)
        self.followed += len(self._inside.intersection(env_ids))
        self._inside.update(env_ids)
        for env_id in env_ids:
            found = output[env_id]
            self.searches.setdefault(env_id, []).append(Search(
                float(np.ravel(found['predicted_value'])[0]), float(found['searched_value']),
                list(found['visit_count_distributions']), int(found['action']), int(found['timestep'])
            ))
        return output

    def _reset(self, *args: Any, **kwargs: Any) -> None:
        env_ids = args[0] if args else kwargs.get('env_id')
        if env_id_list(env_ids):
            self._inside.difference_update(env_ids)
        elif env_ids is None:
            self._inside.clear()
        self._mode.reset(*args, **kwargs)


def env_id_list(env_ids: Any) -> bool:
    """Whether a reset names environments whose episode ended, and not a number for periodic clearing."""
    return isinstance(env_ids, (list, tuple, set))


class Life:
    """
    A policy with workers, each over environments of the given scripts, the same for collection and evaluation; there
    are as many episodes in a collection as environments, or ``n_episode``.
    """

    def __init__(self, scripts: Sequence[int], new: bool, folder: Any, seed: int = 0, timesteps: bool = True,
                 manager: str = 'base', n_episode: int = 0, segment: int = 20, **options: Any) -> None:
        count = len(scripts)
        self.scripts, self.folder, self._timesteps, self._manager = scripts, str(folder), timesteps, manager
        main = small_cartpole(new, collectors=count, evaluators=count, **options)
        main.policy.update(num_segments=count, game_segment_length=segment, n_episode=n_episode or count)
        self.config = compiled(main)
        with contextlib.redirect_stdout(io.StringIO()):
            self.policy = create_policy(self.config.policy, enable_field=['learn', 'collect', 'eval'])
        if ON_MAIN and not new:  # it would keep the last observations as whole numbers, and find no context
            self.policy.pad_token_id = -1.
        for model in (self.policy._model, self.policy._target_model):
            randomise(model, Case(), seed)
            if not new and not model.world_model.config.rotary_emb:
                model.world_model.precompute_pos_emb_diff_kv()
        self._workers: List[Any] = []

    @property
    def cache(self) -> Any:
        """The cache manager of the policy's model."""
        return self.policy._model.world_model.kv_cache_manager

    def envs(self) -> Any:
        """A new environment manager."""
        functions = [
            lambda script=script: ScriptedEnv(dict(script=script, timesteps=self._timesteps)) for script in self.scripts
        ]
        config = EasyDict(type=self._manager, auto_reset=True, shared_memory=False)
        from ding.envs import get_env_manager_cls
        config = get_env_manager_cls(config).default_config()
        config.update(type=self._manager, shared_memory=False, auto_reset=True)
        return create_env_manager(config, functions)

    def worker(self, kind: Any) -> Any:
        """One of LightZero's workers; what it was told is in its ``noted``."""
        mode = 'eval' if kind is MuZeroEvaluator else 'collect'
        noted = Noted(self.policy, mode)
        writer = mock.MagicMock(spec=SummaryWriter)
        options = dict(n_evaluator_episode=3 * len(self.scripts)) if mode == 'eval' else {}
        with quiet():
            worker = kind(
                env=self.envs(), policy=noted.worker_api, tb_logger=writer, exp_name=self.folder,
                policy_config=self.config.policy, **options
            )
        worker.noted = noted
        self._workers.append(worker)
        return worker

    def collect(self, worker: Any, **amount: int) -> Any:
        """One ``collect`` of a collector, in which ties are broken the same way every time."""
        with quiet(), seeded_search(KeylessSearch):
            return worker.collect(train_iter=0, policy_kwargs=dict(temperature=1., epsilon=0.), **amount)

    def evaluate(self, worker: Any, **amount: int) -> Any:
        """One ``eval`` of an evaluator."""
        with quiet(), seeded_search(KeylessSearch):
            return worker.eval(**amount)

    def buffer(self) -> UniZeroGameBuffer:
        """A replay buffer from which everything is reanalyzed, in batches of two."""
        for each in (self.config.policy, self.policy._cfg):
            each.update(reanalyze_ratio=1., batch_size=2, num_unroll_steps=UNROLL)
        return UniZeroGameBuffer(self.config.policy)

    def fill(self, buffer: UniZeroGameBuffer, collector: Any) -> None:
        """Put one collection into a buffer."""
        segments = self.collect(collector)
        for segment in segments[0]:  # LightZero pads a target's rewards with scalars
            segment.reward_segment = np.ravel(segment.reward_segment)
        with quiet():
            buffer.push_game_segments(segments)

    def close(self) -> None:
        """End the workers' environments, once all of them wait: DI-engine does not bear it in the middle of a reset."""
        for worker in self._workers:
            deadline = time.monotonic() + 30
            while len(worker._env.ready_obs) < len(self.scripts) and time.monotonic() < deadline:
                time.sleep(0.01)
            worker.close()


@contextlib.contextmanager
def quiet() -> Any:
    """Workers print and log without end."""
    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


UNROLL = 5  # fewer steps are too few for LightZero's loss
COLLECTORS = {'episodes': MuZeroCollector, 'segments': MuZeroSegmentCollector}
