"""All kernels of a search on a GPU compile for one where there is none. Other tests run them by Triton's interpreter,
which knows no types; here, in a process of its own, each launch compiles its kernel for an H100 and runs nothing."""
import importlib.util
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Set

import pytest

KERNELS = {'select', 'backup', 'draw_continuous', 'draw_discrete', '_attend', '_join', '_multiply', '_finish',
           '_for_search', '_probe'}
# Bytes of shared memory that a program may have, by compute capability: an H100, and the least of all from Ampere on.
SHARED = {90: 232_448, 89: 101_376}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='needs triton')
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    ran = subprocess.run(
        [sys.executable, __file__], env={**kept, 'TRITON_CACHE_DIR': str(tmp_path), 'TRITON_INTERPRET': '0'},
        capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert set(ran.stdout.split('compiled: ')[1].split()) == KERNELS


def main() -> None:
    import test_compiled_search as compiled
    import torch
    from small_models import ON_MAIN, Case, cached_model
    from triton.runtime.jit import JITFunction

    from lzero_kvcache.engine import kernel_launch, linear_kernels
    from lzero_kvcache.engine.weights import Linear
    from lzero_kvcache.search.gpu_search import GpuSearch

    names: Set[str] = set()
    JITFunction.run = lambda kernel, *args, grid, warmup, **options: compile_launch(kernel, args, options, names)
    kernel_launch.can_overlap = lambda kernel: True
    with suppress(RuntimeError):  # it sees that nothing was run
        kernel_launch.probe(torch.device('cpu'))
    compiled.ROWS, compiled.SIMULATIONS = 2, 2
    for case, rules, matmul in (
            (Case(rotary=True), {}, 'float32'), (Case(context_length=130), dict(two_players=True), 'tf32'),
            (Case(rotary=True, continuous=True), dict(sampled=True, continuous=True), 'float32'),
            (Case(sampled=True, gru_gating=not ON_MAIN), dict(sampled=True), 'bfloat16')):
        for root in compiled.roots_of(cached_model(case, 2, 5), case, rules):
            inference = root.world_model.inference
            if case.rotary and case.continuous:  # as on the main branch, whose angles have no end
                inference.engine.geometry = inference.engine.geometry._replace(rotary_positions=2 ** 40)
            search = GpuSearch(inference.shared, matmul)
            search.search(inference.open.steps[-1], root.problem)
            if not rules.get('sampled'):
                latents, steps = torch.zeros(2, case.embed_dim).numpy(), torch.arange(2).numpy()
                for grows in (False, True):
                    search.reanalyze(root.problem, latents, steps, grows)
    for matmul in ('float32', 'tf32', 'bfloat16'):
        for rows in (64, 256):  # other tilings
            kind = torch.bfloat16 if matmul == 'bfloat16' else torch.float32
            layer = Linear(torch.zeros(96, 128, dtype=kind), None, 0, matmul)
            linear_kernels.multiply(layer, torch.zeros(rows, 128))
    print('compiled:', *sorted(names))


def compile_launch(kernel: Any, args: Any, options: Dict[str, Any], names: Set[str]) -> None:
    """Compile a kernel as a launch with these arguments would, where a number that is 1 is a constant."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = dict(zip(kernel.arg_names, args))
    given.update({name: options.pop(name) for name in kernel.arg_names if name in options})
    types = {torch.float32: 'fp32', torch.int32: 'i32', torch.int64: 'i64', torch.bfloat16: 'bf16'}
    for capability in SHARED if kernel.fn.__name__ == '_multiply' else (90, ):
        overlap = capability >= 90 and given['OVERLAP']
        signature, constants = {}, {}
        for index, parameter in enumerate(kernel.params):
            value = overlap if parameter.name == 'OVERLAP' else given[parameter.name]
            if torch.is_tensor(value):
                signature[parameter.name] = '*' + types[value.dtype]
            elif parameter.is_constexpr or value is None or value == 1 and isinstance(value, int):
                signature[parameter.name], constants[index, ] = 'constexpr', value
            else:
                whole = 'i32' if value < 2 ** 31 else 'i64'
                signature[parameter.name] = 'fp32' if isinstance(value, float) else whole
        compiled = triton.compile(
            ASTSource(kernel, signature, constants), target=GPUTarget('cuda', capability, 32),
            options={**options, 'launch_pdl': overlap})
        assert compiled.metadata.shared <= SHARED[capability], (kernel.fn.__name__, compiled.metadata.shared)
    names.add(kernel.fn.__name__)


if __name__ == '__main__':
    main()
