"""Small things that several test files build: ``KeysValues``, managers, LightZero configs and policies, and an audit.

No test lives here. ``small_models.py`` has the models, ``oracle.py`` what is right for them.
"""
import contextlib
import copy
import io
import sys
import threading
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple
from unittest import mock

import lzero.mcts.tree_search.mcts_ctree as mcts_ctree
import numpy as np
import pytest
import torch
from ding.config import compile_config
from ding.policy import create_policy
from easydict import EasyDict
from lzero.model.unizero_world_models.kv_caching import KeysValues
from seeded_search import seeded_search
from small_models import Case, randomise
from zoo.classic_control.cartpole.config import cartpole_unizero_config as cartpole

from lzero_kvcache import KVCacheManager
from lzero_kvcache.engine.slab import Slab
from lzero_kvcache.engine.store import PageStore
from lzero_kvcache.host.tree_search import KeylessSearch

LAYERS, HEADS, HEAD_DIM, CONTEXT_LENGTH = 2, 2, 4, 8
PAGE_MB = 2 * LAYERS * 2 * HEADS * HEAD_DIM * 4 / 2 ** 20


def keys_values(size: int, seed: int = 0, layers: int = LAYERS, heads: int = HEADS, head_dim: int = HEAD_DIM,
                max_tokens: int = CONTEXT_LENGTH, rows: int = 1) -> KeysValues:
    """LightZero's container with ``size`` tokens of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    value = KeysValues(rows, heads, max_tokens, heads * head_dim, layers, torch.device('cpu'))
    for layer in value:
        layer.update(*torch.randn(2, rows, heads, size, head_dim, generator=generator))
    return value


def tokens(value: Any) -> torch.Tensor:
    """All that a ``KeysValues`` holds, ``[layers, 2, rows, heads, size, head_dim]``; a copy."""
    return torch.stack([torch.stack(layer.get()) for layer in value]).detach().clone()


def cache_cfg(**overrides: Any) -> EasyDict:
    """A ``world_model_cfg`` for a manager that is used by hand, to fit ``keys_values``."""
    return EasyDict({
        **dict(num_layers=LAYERS, num_heads=HEADS, embed_dim=HEADS * HEAD_DIM, context_length=CONTEXT_LENGTH,
               env_num=2, num_simulations=4),
        **overrides
    })


def manager(**overrides: Any) -> KVCacheManager:
    """A manager for ``cache_cfg``; options of ``kv_cache_cfg`` are told by ``kv_cache_cfg=dict(...)``."""
    return KVCacheManager(cache_cfg(**overrides))


def paged(**overrides: Any) -> KVCacheManager:
    """The same over a slab on the CPU."""
    used = manager(**overrides)
    slab = Slab(LAYERS, HEADS, HEAD_DIM, getattr(torch, used.config.dtype))
    used.use_store(PageStore(slab, 'lower init_pool_size'))
    return used


def ready(used: KVCacheManager) -> Slab:
    """A manager's slab on the CPU, with room for all of its pages."""
    return used.store.ready(used.page_capacity, torch.device('cpu'))


def roots(used: Any, mode: str = 'collect') -> List[int]:
    """How many root contexts each environment has, found by environment or by key."""
    pools = used.get_stats_summary()[dict(collect='init_pools', eval='eval_pools')[mode]]
    return [pool['size'] for pool in pools.values()]


def audit(used: KVCacheManager, held: Sequence[np.ndarray] = ()) -> None:
    """
    No page is lost and none is used twice: between two steps a page's references are as many as entries name it,
    and tables that searches hold, no entry names it twice, and the pages that can be allocated are those without
    any.
    """
    pages = used._pages
    reserved = pages.capacity - pages.used - pages.free  # the first ones, which no entry may name
    mentions = np.zeros(pages.capacity, dtype=np.int64)
    pools = [*used.init_pools, *used.eval_pools, used.recur_pool]
    for entries in [*(pool.contexts for pool in pools), *used._current.values()]:
        stored = entries.counts > 0
        for table, count in zip(entries.tables[stored], entries.counts[stored]):
            entry = table[:count]
            assert (entry >= reserved).all(), 'an entry names a reserved page'
            assert len(set(entry.tolist())) == count, 'an entry names a page twice'
            mentions[entry] += 1
    for table in held:
        np.add.at(mentions, table.ravel(), 1)
    assert pages.references[reserved:].tolist() == mentions[reserved:].tolist()
    assert pages.free == int((mentions[reserved:] == 0).sum())


def small_cartpole(new: bool, collectors: int = 3, evaluators: int = 2, simulations: int = 4, rotary: bool = True,
                   **world_model_cfg: Any) -> EasyDict:
    """
    LightZero's CartPole config, made small, with the plugin. It draws nothing at random: there is no noise at the root,
    and the most visited action is taken.
    """
    main = copy.deepcopy(cartpole.main_config)
    main.env.update(collector_env_num=collectors, evaluator_env_num=evaluators, n_evaluator_episode=evaluators)
    main.policy.update(
        cuda=False, device='cpu', num_simulations=simulations, collect_num_simulations=simulations,
        eval_num_simulations=simulations, batch_size=4, collector_env_num=collectors,
        evaluator_env_num=evaluators, n_episode=collectors, num_unroll_steps=3, root_noise_weight=0.,
        update_per_collect=2, eps=dict(eps_greedy_exploration_in_collect=True, start=0., end=0.)
    )
    main.policy.model.world_model_cfg.update(
        device='cpu', embed_dim=32, num_layers=2, max_blocks=4, max_tokens=8, context_length=8, rotary_emb=rotary,
        env_num=max(collectors, evaluators), use_new_cache_manager=new
    )
    main.policy.model.world_model_cfg.update(world_model_cfg)
    # LightZero's tree, which tests replace by one that draws nothing; the compiled search has tests of its own.
    main.policy.model.world_model_cfg.setdefault('kv_cache_cfg', EasyDict()).setdefault('search', 'tree')
    return main


def compiled(main: EasyDict, policy_type: str = 'unizero') -> EasyDict:
    """The config as LightZero's entries compile it, with every default merged in."""
    create = copy.deepcopy(cartpole.create_config)
    create.env_manager.type = 'base'
    create.policy.type = policy_type
    create.policy.import_names = ['lzero.policy.unizero', 'lzero.policy.sampled_unizero', 'lzero_kvcache']
    return compile_config(main, seed=0, env=None, auto=True, create_cfg=create, save_cfg=False)


def make_policy(new: bool, seed: int = 0, **options: Any) -> Any:
    """A policy for ``small_cartpole`` with random weights, made as LightZero's entries make it."""
    with contextlib.redirect_stdout(io.StringIO()):
        policy = create_policy(
            compiled(small_cartpole(new, **options)).policy, enable_field=['learn', 'collect', 'eval']
        )
    for model in (policy._model, policy._target_model):
        randomise(model, Case(), seed)
        if not new and not model.world_model.config.rotary_emb:
            model.world_model.precompute_pos_emb_diff_kv()
    return policy


def cache_of(policy: Any) -> Any:
    """The cache manager of a policy's model."""
    return policy._model.world_model.kv_cache_manager


@contextlib.contextmanager
def calls_of(**methods: Tuple[Any, str]) -> Iterator[List[str]]:
    """The names of methods ``(class, attribute)``, in the order in which they are called inside."""
    called: List[str] = []

    def noting(function: Any, name: str) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            called.append(name)
            return function(*args, **options)
        return run

    with contextlib.ExitStack() as patches:
        for name, (owner, attribute) in methods.items():
            noted = noting(getattr(owner, attribute), name)
            patches.enter_context(mock.patch.object(owner, attribute, noted))
        yield called


class Worker:
    """
    Drives a policy as LightZero's collectors and evaluators do: environments with observations of their own, which
    depend on nothing but the environment and its timestep.
    """
    temperature = 1.

    def __init__(self, policy: Any, mode: str = 'collect') -> None:
        self.mode, self.policy = mode, getattr(policy, mode + '_mode')
        with contextlib.redirect_stdout(io.StringIO()):
            self.policy.reset()
        self._timestep: Dict[int, int] = {}
        self._episode: Dict[int, int] = {}

    def step(self, env_ids: Sequence[int]) -> Dict[int, Any]:
        """One step of some environments; what the policy returned for each."""
        with contextlib.redirect_stdout(io.StringIO()), seeded_search(KeylessSearch):
            return self.forward(env_ids)

    def forward(self, env_ids: Sequence[int]) -> Dict[int, Any]:
        """The same with LightZero's tree, which breaks ties by the time of day, and its printed lines."""
        observations = torch.from_numpy(np.stack([self._observe(env_id) for env_id in env_ids]))
        arguments = dict(temperature=self.temperature, epsilon=0.) if self.mode == 'collect' else {}
        try:
            output = self.policy.forward(
                observations, [self.mask(env_id) for env_id in env_ids], to_play=[-1] * len(env_ids),
                ready_env_id=env_ids, timestep=[np.array(self._timestep.get(env_id, 0)) for env_id in env_ids],
                **arguments
            )
        except TypeError as error:
            # Below torch 2.5 a compiled model says that it is in training mode, and Sampled UniZero's evaluation does
            # not convert what it predicts.
            if 'policy_logits_pool' in str(error) and torch.compile(torch.nn.Identity()).eval().training:
                pytest.skip("LightZero's Sampled UniZero cannot be evaluated with this torch")
            raise
        for env_id in env_ids:
            self._timestep[env_id] = self._timestep.get(env_id, 0) + 1
        return output

    def done(self, env_id: int) -> None:
        """An environment's episode ends, and the next one begins."""
        self._timestep[env_id] = 0
        self._episode[env_id] = self._episode.get(env_id, 0) + 1
        with contextlib.redirect_stdout(io.StringIO()):
            self.policy.reset([env_id])

    def mask(self, env_id: int) -> np.ndarray:
        """Which actions are legal; for subclasses."""
        return np.ones(2, np.int8)

    def _observe(self, env_id: int) -> np.ndarray:
        seed = [env_id, self._episode.get(env_id, 0), self._timestep.get(env_id, 0), len(self.mode)]
        return np.random.default_rng(seed).normal(size=4).astype(np.float32)


def assert_same_outputs(actual: Dict[int, Any], expected: Dict[int, Any], env_ids: Sequence[int]) -> None:
    """
    What a policy returned for some environments is the same, to float tolerance. A value is a mean over a support
    from -50 to 50, and rounding in its logits weighs accordingly.
    """
    for env_id in env_ids:
        for name, tolerance in (('predicted_value', 2e-3), ('searched_value', 2e-3), ('predicted_policy_logits', 1e-4)):
            np.testing.assert_allclose(
                actual[env_id][name], expected[env_id][name], rtol=tolerance, atol=tolerance,
                err_msg=f'{name} of {env_id}'
            )
        assert actual[env_id]['visit_count_distributions'] == expected[env_id]['visit_count_distributions']


def differs(actual: Dict[int, Any], expected: Dict[int, Any], env_ids: Sequence[int]) -> List[int]:
    """The environments whose predicted value is another, by more than any rounding."""
    return [
        env_id for env_id in env_ids
        if abs(actual[env_id]['predicted_value'].item() - expected[env_id]['predicted_value'].item()) > 0.05
    ]


def policy_of(keyed: bool = False, seed: int = 11, **options: Any) -> Any:
    """A policy whose searches find their nodes by node, or by the keys of LightZero's own search."""
    policy = make_policy(True, seed=seed, evaluators=3, **options)
    for name in ('_mcts_collect', '_mcts_eval') if keyed else ():
        setattr(policy, name, mcts_ctree.UniZeroMCTSCtree(policy._cfg))
    return policy


def in_threads(*functions: Callable[[], Any]) -> None:
    """Run functions at once, switching as often as can be; what one of them raises is raised here."""
    errors: List[BaseException] = []

    def run(function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function, )) for function in functions]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]
