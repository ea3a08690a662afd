"""What LightZero's C++ tree chose, recorded where its wheel runs (``fixtures/tree_choices``), to be replayed anywhere.

It is the tree of LightZero's main branch, which takes the first of equal scores if it is told to, so that its choices
follow from its rules alone. No test lives here. ``python tests/recorded_choices.py`` records anew.
"""
from pathlib import Path
from typing import Any, List, NamedTuple, Tuple

import numpy as np

from lzero_kvcache.search.tree_arrays import Rules

FILE = Path(__file__).resolve().parent / 'fixtures' / 'tree_choices' / 'choices.npz'
COUNT, LEAST_ROWS = 8, 3
NEAR = 1e-3  # logits nearer to each other, though not equal: their order hangs on last bits of an exponential


class Choices(NamedTuple):
    """A search of some rows: what it was given, what the model answered, what the tree chose, and what was found."""
    rules: np.ndarray  # pb_c_base, pb_c_init, discount, delta, and whether two play
    logits: np.ndarray  # [B, S]
    legal: np.ndarray  # [B, S] in any order, padded with -1; nothing else where all are
    noise: np.ndarray  # [B, S], by position in the list of legal actions
    weight: np.ndarray  # [], of the noise; 0: none
    to_play: np.ndarray  # [B]
    answers: np.ndarray  # [N, B, 2 + S]: rewards, values, logits
    parents: np.ndarray  # [N, B], nodes: 0 is the root, and simulation s adds s + 1
    actions: np.ndarray  # [N, B]
    depths: np.ndarray  # [N, B]
    visits: np.ndarray  # [B, S] of the root's legal actions in their order, padded with -1
    values: np.ndarray  # [B], of the root

    @property
    def legal_lists(self) -> List[List[int]]:
        return [row[row >= 0].tolist() for row in self.legal]


def make_rules(base: float = 19652, init: float = 1.25, discount: float = 0.997, delta: float = 0.01,
               two_players: bool = False, **others: bool) -> Rules:
    """Rules, with LightZero's defaults."""
    return Rules(*np.float32([base, init, discount, delta]), two_players, **others)


def recorded() -> List[Choices]:
    """All of the file."""
    with np.load(FILE) as file:
        return [Choices(*(file[f'{index}/{field}'] for field in Choices._fields)) for index in range(COUNT)]


def record() -> List[Choices]:
    """By the tree of the installed LightZero, the same whenever they are recorded."""
    from test_tree import RandomAnswers, Reference, padded, random_case

    rng, found = np.random.default_rng(0), []
    while len(found) < COUNT:
        two_players = len(found) % 2 > 0
        case = random_case(rng, two_players)
        answer = RandomAnswers(rng, case.rows, case.slots, False)
        nearly_equal = answer.spread < NEAR or 0 < np.ptp(case.logits) < NEAR
        if case.rows < LEAST_ROWS or case.slots < 2 or case.simulations < 2 or nearly_equal:
            continue
        case = case._replace(rules=case.rules._replace(draws_ties=False))
        reference, chosen, answers = Reference(case), [], []
        for simulation in range(case.simulations):
            chosen.append((*reference.traverse(simulation), reference.lengths()))
            rewards, values, logits = given = answer(simulation, *chosen[-1][:2])
            answers.append(np.column_stack([rewards, values, logits]))
            reference.backpropagate(simulation, *given)
        rules = case.rules.base, case.rules.init, case.rules.discount, case.rules.delta, two_players
        parents, actions, depths = np.array(chosen, np.int32).swapaxes(0, 1)
        found.append(Choices(
            np.float64(rules), case.logits, padded(case.legal, case.slots, -1, np.int32), case.noise,
            np.float64(case.weight), np.int32(case.to_play), np.stack(answers), parents, actions, depths,
            padded(reference.visits(), case.slots, -1, np.int32), np.float32(reference.values())
        ))
    return found


def chosen_by_compiled(choices: Choices) -> Tuple[Any, ...]:
    """Parents, actions and depths ``[N, B]``, visits and values by the trees in arrays on a CPU."""
    from test_tree import Case, Ours, padded

    *numbers, two_players = choices.rules.tolist()
    ours, chosen = Ours(Case(
        make_rules(*numbers, bool(two_players), draws_ties=False), len(choices.answers), choices.logits,
        choices.legal_lists, choices.logits.shape[1], choices.noise, float(choices.weight), choices.to_play.tolist()
    )), []
    for simulation, given in enumerate(choices.answers):
        chosen.append((*ours.traverse(simulation), ours.tree.depth.copy()))
        rewards, values, logits = (np.ascontiguousarray(part) for part in np.split(given, [1, 2], axis=1))
        ours.backpropagate(simulation, rewards[:, 0], values[:, 0], logits)
    visits = padded(ours.visits(), choices.logits.shape[1], -1, np.int32)
    return (*np.array(chosen).swapaxes(0, 1), visits, np.float32(ours.values()))


def main() -> None:
    np.savez_compressed(FILE, **{
        f'{index}/{field}': part for index, choices in enumerate(record()) for field, part in choices._asdict().items()
    })


if __name__ == '__main__':
    main()
