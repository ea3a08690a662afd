"""What the benchmarks share: the same model under both systems, interleaved timing, a table and JSON."""
import argparse
import contextlib
import io
import json
import logging
import platform
import statistics
import time
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple, Union
from unittest import mock

import torch
import usage
from ding.utils import MODEL_REGISTRY
from easydict import EasyDict
from rich.console import Console
from rich.table import Table

import lzero_kvcache  # noqa: F401  (registers the models)
from lzero_kvcache.config import KV_CACHE_CFG
from lzero_kvcache.engine.slab import MIB

# The sizes of LightZero's own configs; everything else is the default of its UniZero policy.
PRESETS: Dict[str, Dict[str, Any]] = {
    'cartpole': dict(
        model=dict(observation_shape=4, action_space_size=2),
        world_model=dict(embed_dim=64, num_heads=2, obs_type='vector', rotary_emb=True, action_space_size=2),
    ),
    'atari': dict(
        model=dict(observation_shape=(3, 64, 64), action_space_size=6, downsample=True, norm_type='LN'),
        world_model=dict(embed_dim=768, num_heads=8, obs_type='image', rotary_emb=False, action_space_size=6),
    ),
    'memory': dict(
        model=dict(observation_shape=(3, 5, 5), action_space_size=4),
        world_model=dict(embed_dim=256, num_heads=4, obs_type='image_memory', rotary_emb=False, action_space_size=4),
    ),
}


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = usage.parser(description)
    options.add_argument('--model', choices=sorted(PRESETS), default='cartpole')
    options.add_argument('--context', type=int, default=8, help='context_length')
    options.add_argument('--layers', type=int, default=2)
    options.add_argument('--backend', choices=KV_CACHE_CFG['backend'].choices, default='auto', help='of the new system')
    options.add_argument(
        '--matmul', choices=KV_CACHE_CFG['matmul'].choices, default='float32', help='of the new system, on a GPU')
    options.add_argument('--repeats', type=int, default=5, help='how often the measured unit is repeated')
    options.add_argument('--json', metavar='FILE', help='also write the numbers there')
    return options


def world_model_cfg(args: argparse.Namespace, env_num: int, num_simulations: int, **changes: Any) -> EasyDict:
    """A complete ``world_model_cfg`` of the chosen preset."""
    from lzero.policy.unizero import UniZeroPolicy
    config = EasyDict(UniZeroPolicy.default_config().model.world_model_cfg)
    blocks = max(10, args.context // 2 + 2)
    config.update(
        context_length=args.context, max_blocks=blocks, max_tokens=2 * blocks, num_layers=args.layers,
        device=args.device, env_num=env_num, num_simulations=num_simulations,
        kv_cache_cfg=dict(backend=args.backend),
    )
    config.update(PRESETS[args.model]['world_model'])
    config.update(changes)
    return config


def build_models(args: argparse.Namespace, env_num: int, num_simulations: int,
                 names: Sequence[str] = ('old', 'new')) -> Dict[str, Any]:
    """Models with the same weights, in eval mode: 'old', and under every other name the new system."""
    models = {}
    torch.manual_seed(0)
    with silent():
        for name in names:
            config = world_model_cfg(
                args, env_num, num_simulations, use_new_cache_manager=name != 'old', game_segment_length=50)
            models[name] = MODEL_REGISTRY.build(
                'UniZeroModel', world_model_cfg=config, **PRESETS[args.model]['model']
            ).to(args.device).eval()
        spread_latents(models['old'])
        for model in models.values():
            model.load_state_dict(models['old'].state_dict())
    if not models['old'].world_model.config.rotary_emb:
        models['old'].world_model.precompute_pos_emb_diff_kv()
    return models


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what each construction says."""
    with contextlib.redirect_stdout(io.StringIO()):
        logging.disable(logging.INFO)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def spread_latents(model: torch.nn.Module) -> None:
    """Fresh heads are zero, so that every predicted latent is the same vector; trained ones are not."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.5)


def timed(function: Callable[[], Any], device: str) -> Tuple[Any, float]:
    """What one call returns, and its milliseconds, work on the device included."""
    if device == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device == 'cuda':
        torch.cuda.synchronize()
    return result, (time.perf_counter() - start) * 1e3


class StepTimes:
    """
    Overview:
        What a model's recurrent steps spend in all, and in the forward of their two tokens and heads; the rest is
        caching. Measured apart from other timings, since a GPU is waited for before and after each forward.
    """

    def __init__(self, model: Any, device: str) -> None:
        self._world_model, self._device = model.world_model, device
        self._inside = False
        self.milliseconds = {'step': 0.0, 'forward': 0.0}

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Measure what runs inside."""
        world_model = self._world_model
        new = world_model.use_new_cache_manager
        parts = [(world_model, 'forward_recurrent_inference', 'step')]
        if new:
            inference = world_model.inference
            parts += [(inference, 'expand', 'step'), (inference.engine, '_two_tokens', 'forward')]
        else:
            parts += [(world_model, 'forward', 'forward')]
        with contextlib.ExitStack() as patches:
            for owner, name, part in parts:
                patches.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name), part)))
            yield

    def caching_percent(self, whole: float) -> Union[float, str]:
        """The share of caching in ``whole`` milliseconds; '-' where a graph has steps in one piece."""
        backend = getattr(getattr(self._world_model, 'inference', None), 'backend', None)
        if backend is not None and backend.replayed.graphs.kept:
            return '-'
        return 100 * (self.milliseconds['step'] - self.milliseconds['forward']) / whole

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:

        def run(*args: Any, **kwargs: Any) -> Any:
            if not (self._inside or part == 'step'):  # the forward of a root
                return function(*args, **kwargs)
            self._inside = True
            result, milliseconds = timed(partial(function, *args, **kwargs), self._device)
            self._inside = part != 'step'
            self.milliseconds[part] += milliseconds
            return result

        return run


def allocated_mb(models: Dict[str, Any]) -> Dict[str, float]:
    """MiB that the cache of each model has allocated."""
    return {name: model.world_model.kv_cache_manager.counters()['memory_mb'] for name, model in models.items()}


def memory_of_contexts(world_model: Any) -> Dict[str, float]:
    """MiB of the contexts that the new system stores: as whole copies, and as the pages that they share."""
    manager = world_model.kv_cache_manager
    summary = manager.get_stats_summary()
    contexts = sum(pool['size'] for pool in [*summary['init_pools'].values(), summary['recur_pool']])
    page = manager.store.slab.page_bytes
    copies, pages = contexts * page * world_model.context_length / 2 / MIB, manager.pages_used * page / MIB
    return {'copies MiB': copies, 'pages MiB': pages, 'copies / pages': copies / pages}


def median(values: Sequence[float]) -> float:
    """The median, robust against what else the machine does."""
    return statistics.median(values)


def report(title: str, rows: List[Dict[str, Any]], args: argparse.Namespace) -> None:
    """Print a table and write the JSON that was asked for."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify='right')
    for row in rows:
        table.add_row(*(f'{value:.3g}' if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=140).print(table)
    if args.json:
        machine = torch.cuda.get_device_name() if args.device == 'cuda' else platform.processor() or platform.machine()
        with open(args.json, 'w') as file:
            json.dump({
                'title': title, 'rows': rows, 'options': vars(args), 'torch': torch.__version__, 'machine': machine,
                'threads': torch.get_num_threads(),
            }, file, indent=2)
