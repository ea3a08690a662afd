"""Runs that never ran, whose numbers can be calculated by hand: event files, configs and summaries as of real ones."""
import json
from pathlib import Path

from ding.config.config import save_config_py
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from lzero_kvcache.comparison.reading import find_runs, read_run
from lzero_kvcache.comparison.table import Comparison

# Some moment in the past; every value below is exact in the 32 bits of an event file.
BEGAN = 1_700_000_000.
MACHINE = dict(system='Linux', processor='x86_64', cpus=2, threads=1, gpu=None, python='3.11.7', torch='2.12.1',
               ding='v0.5.3')


def write_events(folder, points, began=BEGAN, created=None):
    """An event file of scalars: (seconds after ``began``, step, tag, value), in the order in which they are written."""
    path = Path(folder) / f'events.out.tfevents.{int(began if created is None else created)}.here'
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'wb') as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=began, file_version='brain.Event:2').SerializeToString())
        for seconds, step, tag, value in points:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.write(Event(wall_time=began + seconds, step=step, summary=summary).SerializeToString())
    return path


def write_run(folder, new=False, seed=0, seconds=100., env_steps=1000, rewards=(10., 150.), search_ms=(80., 40.),
              step_ms=(4., 2.), hits=(60, 120), queries=(100, 200), evictions=(0., 8.), memory_mb=(2., 2.),
              began=BEGAN, env_id='CartPole-v0', summary=None, config=True, cache_tags=True, resumed_at=None):
    """
    A training of as many evaluations as ``rewards`` and as many points of a cache tag as there are values, evenly over
    the time. ``summary`` holds what differs from the events; None for a run without ``summary.json``. With
    ``resumed_at`` environment steps, it went on from a checkpoint there, in a folder of its own.
    """
    folder, points, start = Path(folder), [], resumed_at or 0

    def add(tag, values, iterations=False):
        for index, value in enumerate(values):
            part = index / max(1, len(values) - 1)
            step = start // 4 + index if iterations else round(start + part * (env_steps - start))
            points.append((part * seconds, step, tag, value))

    add('evaluator_step/reward_mean', rewards)
    add('Buffer/memory_usage/process', (512., 640., 600.), iterations=True)
    if cache_tags:
        tags = dict(search_ms=search_ms, step_ms=step_ms, memory_mb=memory_mb, init_hits=hits, init_queries=queries,
                    init_hit_rate=[hit / query for hit, query in zip(hits, queries)])
        if new:
            tags['total_evictions'] = evictions
        for name, values in tags.items():
            add(f'kv_cache_iter/{name}', values, iterations=True)
            add(f'kv_cache_step/{name}', values)
    write_events(folder / 'log' / 'serial', sorted(points, key=lambda point: point[0]), began)
    if config:
        world_model = dict(context_length=8, device='cpu', use_new_cache_manager=new)
        save_config_py(dict(
            env=dict(env_id=env_id, manager=dict(episode_num=float('inf'))),
            policy=dict(model=dict(world_model_cfg=world_model), learning_rate=1e-4),
            exp_name=str(folder), seed=seed,
        ), str(folder / 'total_config.py'))
    if summary is not None:
        known = dict(outcome='done', task='train', cache='new' if new else 'old', seed=seed, device='cpu', processes=1,
                     max_env_step=env_steps, max_train_iter=None, env_step=env_steps, seconds=seconds,
                     env_steps_per_second=(env_steps - start) / seconds, host_memory_mb=700., device_memory_mb=None,
                     resumed_at=[] if resumed_at is None else [resumed_at], earlier=[], machine=MACHINE,
                     last_reward=rewards[-1], best_reward=max(rewards))
        (folder / 'summary.json').write_text(json.dumps({**known, **summary}))
    return str(folder)


def event_file(folder):
    """The only one of a run."""
    [path] = Path(folder).rglob('*tfevents*')
    return path


def break_off(folder, share=0.5):
    """Cut a run's event file off, as a kill or a copy that was interrupted does."""
    path = event_file(folder)
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])


def read(*paths):
    """The runs that paths stand for."""
    runs = find_runs(paths)
    for run in runs:
        read_run(run)
    return runs


def compared(*paths, groups=()):
    """Their comparison."""
    return Comparison(read(*paths), groups, {})


def compare_json(folder):
    """What a comparison wrote for programs, if it is JSON in the strict sense."""
    def refuse(constant):
        raise AssertionError(f'{constant} is not JSON')

    return json.loads((Path(folder) / 'compare.json').read_text(encoding='utf-8'), parse_constant=refuse)


def row(comparison, name):
    """That of a measure."""
    [found] = [row for row in comparison.rows if row.measure.name == name]
    return found


def pair(folder, old=None, new=None):
    """An old and a new run that are comparable but for what is given."""
    return [write_run(folder / 'old_seed0', summary={}, **(old or {})),
            write_run(folder / 'new_seed0', new=True, summary={}, began=BEGAN + 1000, **(new or {}))]
