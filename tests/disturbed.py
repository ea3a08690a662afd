"""A search in the middle of four steps that something disturbs, or nothing, and a step that is abandoned. No test lives
here."""
import functools
import gc

import numpy as np
from oracle import assert_same, random_trace, row_differences
from players import ByNode
from small_models import Case, cached_model

SEED, CASE = 11, Case()
ROWS, ENVIRONMENTS, SIMULATIONS = 2, 4, 6
MIDDLE = SIMULATIONS + 1 + 4  # of the second search


class Broken(Exception):
    """What a step may die of."""


def trace_of(rows=ROWS, seed=SEED, root_steps=4):
    return random_trace(np.random.default_rng(seed), CASE, rows, root_steps=root_steps, simulations=SIMULATIONS)


def model_of(**options):
    return cached_model(CASE, ENVIRONMENTS, SEED, **options)


def lived(player, trace, disturb=None):
    """What a player is answered in its steps, in the second of which something else goes on."""
    answers = []
    for number, event in enumerate(trace.events):
        if number == MIDDLE and disturb is not None:
            disturb(player.model, player)
            pages_that_are_taken(player.model)
        answers.append({name: part.clone() for name, part in player.play(event).items()})
    player.close()
    return answers


@functools.lru_cache(maxsize=None)
def undisturbed(kind, mode='collect', env_ids=tuple(range(ROWS)), **trace):
    """The same of a player that is alone."""
    return lived(kind(model_of(), mode, list(env_ids)), trace_of(len(env_ids), **trace))


def assert_undisturbed(answers, expected):
    assert len(answers) == len(expected)
    for answer, right in zip(answers, expected):
        assert_same(row_differences(answer, right))


def pages_that_are_taken(model, player=None):
    """More than there are: the storage grows; and all that is free is overwritten."""
    manager = model.world_model.kv_cache_manager
    with manager.lease() as lease:
        taken = lease.allocate(manager._pages.free + 7)
        model.world_model.inference.shared.slab().data[taken] = float('nan')
    model.world_model.inference.shared.slab().data[taken] = 0.


def abandoned(model, events):
    other = ByNode(model)
    for event in events:
        other.play(event)
    return other._open.pop_all()


def as_garbage(model, events):
    cycle = [abandoned(model, events)]
    cycle.append(cycle)
    del cycle
    gc.collect()
