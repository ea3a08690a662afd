"""The rules of ``tree.py`` as Triton kernels, a program for each row; actions are the slots. Importing it imports
Triton.

Shapes as in ``tree.py``; ``LANES`` is the power of two that has room for all slots.
"""
import triton
import triton.language as tl
from triton.language.random import philox_impl

FAR: tl.constexpr = tl.constexpr(1e6)
TIE: tl.constexpr = tl.constexpr(1e-6)


@triton.jit
def select(visits, value_sum, reward, prior, child, order, low, high, path, depth, action, tables, counts,
           key, pages, timesteps, step_tables, step_counts, positions,
           rows, nodes, slots, width, base, init, discount, delta, repeats, simulation,
           TWO_PLAYERS: tl.constexpr, ROTARY: tl.constexpr, LANES: tl.constexpr, PAGES: tl.constexpr):
    """Walk to where a simulation adds its node, and write what the model's step from its parent needs: the pages of
    its context and then ``pages[row]``, their count, and the positions of both tokens."""
    row = tl.program_id(0)
    first_node = row.to(tl.int64) * nodes
    lane = tl.arange(0, LANES)
    least, most = tl.load(low + row), tl.load(high + row)
    seed = tl.load(key)
    sign = -1.0 if TWO_PLAYERS else 1.0
    node = row * 0
    parent = row * 0
    taken = row * 0
    steps = row * 0
    above = least * 0
    while node <= simulation:
        tl.store(path + first_node + steps, node)
        own = (first_node + node) * slots
        slot = tl.load(order + own + lane, mask=lane < slots, other=-1)
        named = slot >= 0
        below = tl.load(child + own + slot, mask=named, other=-1)
        seen = below >= 0
        count = tl.load(visits + first_node + below, mask=seen, other=1).to(tl.float32)
        mean_value = tl.load(value_sum + first_node + below, mask=seen, other=0.0) / count
        gained = tl.load(reward + first_node + below, mask=seen, other=0.0)
        total = tl.sum(tl.where(seen, gained + discount * mean_value, 0.0), 0)
        number = tl.sum(seen.to(tl.float32), 0)
        at_root = (node == 0) & (number > 0)
        above = tl.where(at_root, total / tl.maximum(number, 1.0), (above + total) / (number + 1))
        value = tl.where(seen, gained + discount * (sign * mean_value), above)
        span = most - least
        value = tl.where(span > 0, (value - least) / tl.where(span < delta, delta, span), value)
        value = tl.where(value < 0, 0.0, value)
        value = tl.where(value > 1, 1.0, value)
        others = (tl.load(visits + first_node + node) - 1).to(tl.float32)
        explored = tl.log((others + base + 1) / base) + init
        chance = tl.load(prior + own + slot, mask=named, other=0.0)
        score = explored * (tl.sqrt(others) / (tl.where(seen, count, 0.0) + 1)) * chance + value
        score = tl.where(named & (score > -FAR), score, float('-inf'))  # which is not for nan either
        best = tl.max(score, 0)
        first = tl.where(best > -FAR, tl.min(tl.where(score == best, lane, LANES), 0), LANES)
        tied = (lane >= first) & (score >= best - TIE) & named
        ties = tl.sum(tied.to(tl.int32), 0)
        word, _, _, _ = philox_impl(
            row.to(tl.uint32), (simulation + row * 0).to(tl.uint32), steps.to(tl.uint32), (row * 0).to(tl.uint32),
            seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
        )
        drawn = ((word.to(tl.uint64) * ties.to(tl.uint64)) >> 32).to(tl.int32)
        chosen = tied & (tl.cumsum(tied.to(tl.int32), 0) == drawn + 1)
        taken = tl.sum(tl.where(chosen, slot, 0), 0)  # slot 0 where no score is a number
        parent = node
        node = tl.load(child + own + taken)
        if node < 0:
            node = simulation + row * 0 + 1
            tl.store(child + own + taken, node)
        steps += 1
    tl.store(path + first_node + steps, node)
    tl.store(depth + row, steps)
    tl.store(action + row, taken.to(tl.int64))

    page = tl.arange(0, PAGES)
    count = tl.load(counts + first_node + parent)
    context = (first_node + parent) * width
    new = tl.load(pages + row)
    held = tl.load(tables + context + page, mask=page < count, other=0)
    tl.store(step_tables + row * (width + 1) + page, tl.where(page == count, new, held), mask=page <= width)
    tl.store(step_counts + row, count)
    dropped = tl.where(count == width, 1, 0)
    kept = tl.load(tables + context + page + dropped, mask=page + dropped < count, other=0)
    grown = (first_node + node) * width
    tl.store(tables + grown + page, tl.where(page == count - dropped, new, kept), mask=page < width)
    tl.store(counts + first_node + node, count - dropped + 1)
    if ROTARY:
        after = tl.load(timesteps + row) + steps
        tl.store(positions + row, (2 * after + 1) % repeats)
        tl.store(positions + rows + row, (2 * after + 2) % repeats)
    else:
        tl.store(positions + row, tl.maximum(2 * count - 1, 0))
        tl.store(positions + rows + row, 2 * count)


@triton.jit
def backup(visits, value_sum, reward, prior, child, low, high, path, depth, predicted, broken,
           nodes, slots, discount, simulation, TWO_PLAYERS: tl.constexpr, LANES: tl.constexpr):
    """Expand the new node by reward, value and policy logits ``predicted [B, 2 + S]``, and add its value to the path.
    What is no number counts as 0, and its row in ``broken``."""
    row = tl.program_id(0)
    first_node = row.to(tl.int64) * nodes
    lane = tl.arange(0, LANES)
    named = lane < slots
    given = predicted + row * (slots + 2)
    gained, value = tl.load(given), tl.load(given + 1)
    logits = tl.load(given + 2 + lane, mask=named, other=0.0)
    infinite = float('inf')
    bad = named & ~(tl.abs(logits) < infinite)
    lost = (tl.sum(bad.to(tl.int32), 0) > 0) | ~(tl.abs(gained) < infinite) | ~(tl.abs(value) < infinite)
    tl.store(broken + row, tl.load(broken + row) + lost.to(tl.int32))
    logits = tl.where(bad, 0.0, logits)
    gained = tl.where(tl.abs(gained) < infinite, gained, 0.0)
    value = tl.where(tl.abs(value) < infinite, value, 0.0)

    new = first_node + simulation + 1
    largest = tl.maximum(tl.max(tl.where(named, logits, -FAR), 0), -FAR)
    chance = tl.where(named, tl.exp(logits - largest), 0.0)
    tl.store(prior + new * slots + lane, chance / tl.sum(chance, 0), mask=named)
    tl.store(child + new * slots + lane, tl.full((LANES, ), -1, tl.int32), mask=named)
    tl.store(reward + new, gained)

    least, most = tl.load(low + row), tl.load(high + row)
    sign = -1.0 if TWO_PLAYERS else 1.0
    last = tl.load(depth + row)
    at = last
    while at >= 0:
        node = first_node + tl.load(path + first_node + at)
        fresh = at == last  # whose arrays the last search wrote
        own = (last - at) % 2 == 0  # the turn of who moves at the new node
        added = value
        if TWO_PLAYERS:
            added = tl.where(own, value, -value)
        total = tl.where(fresh, 0.0, tl.load(value_sum + node)) + added
        count = tl.where(fresh, 0, tl.load(visits + node)) + 1
        step = tl.where(fresh, gained, tl.load(reward + node))
        tl.store(value_sum + node, total)
        tl.store(visits + node, count)
        reached = step + discount * (sign * (total / count.to(tl.float32)))
        most = tl.where(reached > most, reached, most)
        least = tl.where(reached < least, reached, least)
        if TWO_PLAYERS:
            step = tl.where(own, -step, step)
        value = step + discount * value
        at -= 1
    tl.store(low + row, least)
    tl.store(high + row, most)
