"""The rules of :mod:`.tree` as kernels for a GPU; each program has a row. Importing it imports Triton.

Scores equal those of the compiled trees to the last bit: children are summed in order, products and sums are not fused
(``enable_fp_fusion=False``), and divisions are rounded. Shapes are those of :mod:`.tree_arrays`; ``explored`` and
``spread`` are tables by number of visits.
"""
import triton
import triton.language as tl

from ..engine.kernel_launch import wait
from .tree_arrays import FAR, NEAR, TIE

_FAR, _NEAR, _TIE = tl.constexpr(FAR), tl.constexpr(NEAR), tl.constexpr(TIE)


@triton.jit
def _quality(reward, discount, sign, value_sum, visits):
    return reward + discount * (sign * tl.div_rn(value_sum, visits.to(tl.float32)))


@triton.jit
def _unseen(worth, seen, index, above, discount, is_root, slots):
    """The value of children without visits: at the root the mean of the others, elsewhere that mean with the parent's
    ``above`` as one more of them."""
    total, visited = discount * 0, tl.sum(seen.to(tl.int32), 0)
    for one in range(slots):
        total += tl.sum(tl.where(seen & (index == one), worth, 0.), 0)
    if is_root & (visited > 0):
        above = tl.div_rn(total, visited.to(tl.float32))
    else:
        above = tl.div_rn(above + total, (visited + 1).to(tl.float32))
    return above


@triton.jit
def _best(scores, known, index, key, row, simulation, depth, SLOTS: tl.constexpr, DRAWS_TIES: tl.constexpr):
    """The child with the best score, and that score: of equal ones, the first or one that is drawn."""
    valid = known & (scores > -_FAR)  # not nan
    scores = tl.where(valid, scores, -_FAR)
    best = tl.max(scores, 0)
    first = tl.min(tl.where(valid & (scores == best), index, SLOTS), 0)
    chosen = valid & (index == first)
    if DRAWS_TIES:
        tied = valid & (index >= first) & (scores >= best - _NEAR)
        ties = tl.sum(tied.to(tl.int32), 0)
        word, _b, _c, _d = tl.philox(tl.load(key), row, simulation, depth, _TIE)
        left = tl.umulhi(word, ties.to(tl.uint32)).to(tl.int32)
        chosen = tied & (tl.cumsum(tied.to(tl.int32), 0) - 1 == left)
    return chosen, best


@triton.jit
def _write_context(tables, counts, window, window_counts, page, parent, new, row, rows, PAGES: tl.constexpr,
                   PADDED: tl.constexpr):
    """Write the parent's context to ``window``, and to the new node's table with ``page`` at its end, without the
    oldest page where it is full; returns the parent's pages."""
    count = tl.load(counts + parent)
    column = tl.arange(0, PADDED)
    context = tl.load(tables + parent * PAGES + column, mask=column < count, other=0)
    tl.store(window + column * rows + row, context.to(tl.int64), mask=column < PAGES)
    tl.store(window + PAGES * rows + row, page.to(tl.int64))
    tl.store(window_counts + row, count.to(tl.int64))
    dropped = (count == PAGES).to(tl.int32)
    grown = tl.load(tables + parent * PAGES + column + dropped, mask=column + dropped < count, other=0)
    grown = tl.where(column == count - dropped, page, grown)
    tl.store(tables + new * PAGES + column, grown, mask=column < PAGES)
    tl.store(counts + new, count - dropped + 1)
    return count


@triton.jit
def _write_positions(positions, timesteps, count, after, row, rows, rotary_positions, action_offset,
                     observation_offset):
    """Write the positions of the new node's action and observation, ``after`` steps from the root."""
    acted, observed = (2 * count - 1).to(tl.int64), (2 * count).to(tl.int64)
    if rotary_positions > 0:  # on the main branch, of 64 bits
        twice = (2 * (tl.load(timesteps + row) + after)).to(tl.int64)
        acted = (twice + action_offset) % rotary_positions
        observed = (twice + observation_offset) % rotary_positions
    tl.store(positions + row, acted)
    tl.store(positions + rows + row, observed)


@triton.jit
def select(visits, value_sum, reward, prior, child, order, draws, low, high, path, depths, actions, tables, counts,
           key, simulation_at, timesteps, pages, parents, taken, window, window_counts, positions, explored, spread,
           rules, rows, nodes, slots, action_size, rotary_positions, action_offset, observation_offset,
           SLOTS: tl.constexpr, ACTION: tl.constexpr, PAGES: tl.constexpr, PADDED: tl.constexpr,
           TWO_PLAYERS: tl.constexpr, SAMPLED: tl.constexpr, DRAWS_TIES: tl.constexpr, INDEX_FOR_DEPTH: tl.constexpr,
           OVERLAP: tl.constexpr):
    """Select the parent of the node that the simulation adds, and write the inputs of the model's step: parents
    ``[B]``, the actions taken there ``[B]`` or ``[B, A]``, the window of pages ``[PAGES + 1, B]``, counts ``[B]`` and
    positions ``[2, B]``."""
    wait(OVERLAP)
    row = tl.program_id(0)
    simulation = tl.load(simulation_at + row)
    discount, delta = tl.load(rules), tl.load(rules + 1)
    sign = -1.0 if TWO_PLAYERS else 1.0
    index = tl.arange(0, SLOTS)
    first_node = row * nodes
    lowest, highest = tl.load(low + row), tl.load(high + row)
    width = highest - lowest
    divisor = tl.where(width < delta, delta, width)
    node, parent, depth, action = row * 0, row * 0, row * 0, row * 0
    above = discount * 0
    passed = tl.load(visits + first_node)
    while node <= simulation:
        parent = node
        tl.store(path + first_node + depth, node)
        begin = (first_node + node) * slots
        there = index < slots
        ordered = there
        if not SAMPLED:  # then only the root may lack actions
            ordered = there & (node == 0)
        slot = tl.where(ordered, tl.load(order + begin + index, mask=ordered, other=-1), index)
        known = there & (slot >= 0)
        children = tl.load(child + begin + slot, mask=known, other=-1)
        seen = known & (children >= 0)
        reached = tl.load(visits + first_node + children, mask=seen, other=1)
        sums = tl.load(value_sum + first_node + children, mask=seen, other=0.)
        rewards = tl.load(reward + first_node + children, mask=seen, other=0.)
        worth = _quality(rewards, discount, 1.0, sums, reached)
        above = _unseen(worth, seen, index, above, discount, node == 0, slots)
        value = tl.where(seen, _quality(rewards, discount, sign, sums, reached), above)
        value = tl.where(width > 0, tl.div_rn(value - lowest, divisor), value)
        value = tl.where(value < 0, 0., value)
        value = tl.where(value > 1, 1., value)
        others = passed - 1
        priors = tl.load(prior + begin + slot, mask=known, other=0.)
        more = tl.div_rn(tl.load(spread + others), tl.where(seen, reached, 0).to(tl.float32) + 1.0)
        scores = tl.load(explored + others) * more * priors + value
        chosen, best = _best(scores, known, index, key, row, simulation, depth, SLOTS, DRAWS_TIES)
        step = tl.sum(tl.where(chosen, slot, 0), 0)
        action = tl.sum(tl.where(chosen, index, 0), 0) if SAMPLED else step
        node = tl.max(tl.where(chosen, children, -1), 0)
        passed = tl.sum(tl.where(chosen, reached, 0), 0)
        if best <= -_FAR:  # no score is a number
            node = tl.load(child + begin)
            passed = tl.load(visits + first_node + tl.maximum(node, 0))
        if node < 0:
            node = simulation + 1
            tl.store(child + begin + step, node)
        depth += 1
    tl.store(path + first_node + depth, node)
    tl.store(depths + row, depth)
    tl.store(actions + row, action)
    tl.store(parents + row, parent.to(tl.int64))
    after = parent if INDEX_FOR_DEPTH else depth
    if SAMPLED:
        part = tl.arange(0, ACTION)
        drawn = draws + ((first_node + parent) * slots + action) * action_size
        numbers = tl.load(drawn + part, mask=part < action_size, other=0.)
        tl.store(taken + row * action_size + part, numbers.to(taken.dtype.element_ty), mask=part < action_size)
    else:
        tl.store(taken + row, action.to(tl.int64))
    page = tl.load(pages + simulation * rows + row)
    count = _write_context(
        tables, counts, window, window_counts, page, first_node + parent, first_node + simulation + 1, row, rows, PAGES,
        PADDED)
    _write_positions(
        positions, timesteps, count, after, row, rows, rotary_positions, action_offset, observation_offset)


@triton.jit
def mended(number):
    """The number, or 0 for nan and inf."""
    return tl.where(tl.abs(number) < float('inf'), number, 0.)


@triton.jit
def backup(visits, value_sum, reward, prior, child, low, high, path, depths, broken, predicted,
           simulation_at, rules, rows, nodes, slots, policy, SLOTS: tl.constexpr, POLICY: tl.constexpr,
           TWO_PLAYERS: tl.constexpr, SAMPLED: tl.constexpr, OVERLAP: tl.constexpr):
    """Expand the new node by predictions ``[B, 2 + P]``, with 0 for nan and inf, back its value up, and count the
    simulation. Where trees are sampled, another kernel draws the node's actions."""
    wait(OVERLAP)
    row = tl.program_id(0)
    simulation = tl.load(simulation_at + row)
    discount = tl.load(rules)
    index, column = tl.arange(0, SLOTS), tl.arange(0, POLICY)
    there = column < policy
    numbers = predicted + row * (2 + policy)
    new_reward, value = tl.load(numbers), tl.load(numbers + 1)
    logits = tl.load(numbers + 2 + column, mask=there, other=0.)
    odd = tl.sum((mended(logits) != logits).to(tl.int32), 0)
    odd += (mended(new_reward) != new_reward).to(tl.int32) + (mended(value) != value).to(tl.int32)
    before, last = tl.load(broken + row), tl.load(depths + row)
    tl.store(broken + row, before + (odd > 0).to(tl.int32))
    if (odd > 0) & (before == 0):
        tl.store(broken + rows + row, last)
    new_reward, value = mended(new_reward), mended(value)
    first_node = row * nodes
    new = first_node + simulation + 1
    tl.store(child + new * slots + index, index * 0 - 1, mask=index < slots)
    if not SAMPLED:
        logits = tl.where(there, mended(logits), -float('inf'))
        powers = tl.exp(logits - tl.max(logits, 0))
        tl.store(prior + new * slots + column, tl.div_rn(powers, tl.sum(powers, 0)), mask=there)
    tl.store(reward + new, new_reward)
    lowest, highest = tl.load(low + row), tl.load(high + row)
    sign = -1.0 if TWO_PLAYERS and not SAMPLED else 1.0
    depth = last
    while depth >= 0:
        node = first_node + tl.load(path + first_node + depth)
        theirs = value
        old = depth < last  # nobody but this program has written the new one
        own_reward = tl.where(old, tl.load(reward + node), new_reward)
        step = own_reward
        if TWO_PLAYERS:
            own = (last - depth) % 2 == 0
            theirs = tl.where(own, value, -value)
            step = tl.where(own, -own_reward, own_reward)
        added = tl.where(old, tl.load(value_sum + node), 0.) + theirs
        count = tl.where(old, tl.load(visits + node), 0) + 1
        tl.store(value_sum + node, added)
        tl.store(visits + node, count)
        reached = _quality(own_reward, discount, sign, added, count)
        highest = tl.where(reached > highest, reached, highest)
        lowest = tl.where(reached < lowest, reached, lowest)
        value = step + discount * value
        depth -= 1
    tl.store(low + row, lowest)
    tl.store(high + row, highest)
    tl.store(simulation_at + row, simulation + 1)
