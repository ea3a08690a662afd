"""Where the time of one collect step goes under each system, by function and, on a GPU, by kernel.

    python benchmarks/profile_search.py --device cuda --model atari --envs 64 --simulations 50
"""
import contextlib
import cProfile
import io
import pstats
from typing import Any

import torch
import usage
from collect_step import build_policies, collect, preset_configs
from common import parser


def main() -> None:
    options = parser(__doc__)
    options.add_argument('--envs', type=int, default=64)
    options.add_argument('--simulations', type=int, default=25)
    options.add_argument('--rows', type=int, default=15, help='functions and kernels shown')
    args = options.parse_args()
    policies = build_policies(preset_configs(args, args.envs), args.device)
    for name in policies:
        alone = {name: policies[name]}
        with contextlib.redirect_stdout(io.StringIO()):
            collect(alone, args.envs, 3)
            profile = cProfile.Profile()
            profile.enable()
            milliseconds = collect(alone, args.envs, 3)[name]
            profile.disable()
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats('tottime').print_stats(args.rows)
        print(f'== {name}: {sum(milliseconds) / 3:.1f} ms a collect step, of Python:')
        print('\n'.join(line for line in text.getvalue().splitlines()[4:] if line.strip()))
        if args.device == 'cuda':
            print(f'== {name}: of the GPU:')
            print(kernels(alone, args))


def kernels(policies: Any, args: Any) -> str:
    """The kernels that take longest, over one collect step."""
    from torch.profiler import ProfilerActivity, profile
    with contextlib.redirect_stdout(io.StringIO()), profile(activities=[ProfilerActivity.CUDA]) as record:
        collect(policies, args.envs, 1)
        torch.cuda.synchronize()
    return record.key_averages().table(sort_by='self_cuda_time_total', row_limit=args.rows, max_name_column_width=60)


if __name__ == '__main__':
    usage.run(main)
