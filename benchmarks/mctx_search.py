"""A search by google-deepmind/mctx with the matrix products of this model, to compare with: no attention, no contexts.

``collect_step.py`` runs it in a process of its own where jax and mctx are installed (``pip install "jax[cpu]" mctx``):

    python benchmarks/mctx_search.py cpu 8 25 64 2 2 101 20

The numbers are environments, simulations, width, layers, actions, support and repeats; it prints the median, ms.
"""
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from typing import Any, Callable, Optional

import numpy as np


def mctx_search_ms(device: str, matmul: str, *numbers: int) -> Optional[float]:
    """What this file prints for its arguments, with products as exact as ours; None where mctx is not installed."""
    if importlib.util.find_spec('jax') is None or importlib.util.find_spec('mctx') is None:
        return None
    command = [sys.executable, __file__, device, *map(str, numbers)]
    precision = {'float32': 'highest', 'tf32': 'tensorfloat32'}.get(matmul, matmul)
    # By itself jax takes most of a GPU's memory, beside torch's.
    environment = dict(JAX_DEFAULT_MATMUL_PRECISION=precision, XLA_PYTHON_CLIENT_PREALLOCATE='false')
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**environment, **os.environ}, check=True)
    return float(done.stdout.split()[-1])


def mctx_search(device: str, envs: int, simulations: int, embed: int, layers: int, actions: int,
                support: int) -> Callable[[], Any]:
    """A compiled search that returns when it is done."""
    if device == 'cpu':  # one core, as the other systems are given one thread; XLA's flags for one cost it a third
        if hasattr(os, 'sched_setaffinity'):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    import jax
    import jax.numpy as jnp
    import mctx

    rng = np.random.default_rng(0)

    def weights(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape) * 0.05, dtype=jnp.float32)

    blocks = [(weights(embed, 3 * embed), weights(embed, embed), weights(embed, 4 * embed), weights(4 * embed, embed))
              for _ in range(layers)]
    heads = {name: (weights(embed, embed), weights(embed, size)) for name, size in (
        ('reward', support), ('latent', embed), ('value', support), ('policy', actions))}
    table, numbers = weights(actions, embed), jnp.arange(support, dtype=jnp.float32) - support // 2

    def norm(x: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def token(x: Any) -> Any:
        for qkv, projection, wide, narrow in blocks:
            x = x + (norm(x) @ qkv)[:, :embed] @ projection
            x = x + jax.nn.gelu(norm(x) @ wide) @ narrow
        return norm(x)

    def head(name: str, x: Any) -> Any:
        return jax.nn.gelu(x @ heads[name][0]) @ heads[name][1]

    def scalar(logits: Any) -> Any:
        value = jax.nn.softmax(logits) @ numbers
        root = (jnp.sqrt(jnp.abs(value) * 0.004 + 1.004004) - 1) * 500
        return jnp.sign(value) * (root * root - 1)

    def step(params: Any, key: Any, action: Any, latent: Any) -> Any:
        x = token(table[action] + 0 * latent)
        latent = jax.nn.softmax(head('latent', x).reshape(-1, embed // 8, 8)).reshape(-1, embed)
        y = token(latent)
        output = mctx.RecurrentFnOutput(
            reward=scalar(head('reward', x)), discount=jnp.full(envs, 0.997), prior_logits=head('policy', y),
            value=scalar(head('value', y))
        )
        return output, latent

    @jax.jit
    def search(key: Any) -> Any:
        root = mctx.RootFnOutput(
            prior_logits=jnp.zeros((envs, actions)), value=jnp.zeros(envs), embedding=jnp.zeros((envs, embed))
        )
        return mctx.muzero_policy(None, key, root, step, simulations).action_weights

    key = jax.random.PRNGKey(0)
    search(key).block_until_ready()
    return lambda: search(key).block_until_ready()


def main(device: str, *numbers: str) -> None:
    *sizes, repeats = map(int, numbers)
    search = mctx_search(device, *sizes)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        search()
        times.append(1e3 * (time.perf_counter() - start))
    print(statistics.median(times))


if __name__ == '__main__':
    main(*sys.argv[1:])
