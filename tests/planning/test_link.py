from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_superpipe.planning.link import Link

from .strategies import thorough
from .workloads import machine

copies = st.lists(st.tuples(st.booleans(), st.integers(0, 20), st.integers(0, 10), st.integers(0, 5)), max_size=12)
TICK_S = 1 / 64


def ticking(handed_over, shared_rate):
    """When each copy ends, found by going on in small ticks."""
    lanes = {True: [], False: []}
    for index, (way, num_bytes, ready, _) in enumerate(handed_over):
        lanes[way].append([index, float(num_bytes), ready])
    ends, now = [0.0] * len(handed_over), 0.0
    while any(lanes.values()):
        for lane in lanes.values():
            while lane and lane[0][2] <= now and lane[0][1] <= 1e-9:
                ends[lane.pop(0)[0]] = now
        active = [lane for lane in lanes.values() if lane and lane[0][2] <= now]
        for lane in active:
            lane[0][1] -= TICK_S * (shared_rate if len(active) == 2 else 1.0)
        now += TICK_S
    return ends


def in_time(drawn):
    """Copies as a program hands them over: one after the other, each ready then or later."""
    now, found = 0, []
    for way, num_bytes, wait, more in drawn:
        now += wait
        found.append((way, num_bytes, now + more, now))
    return found


@thorough
@given(copies, st.sampled_from([1.0, 0.5, 0.75]))
def test_ends_are_those_of_small_ticks(drawn, shared_rate):
    handed_over = in_time(drawn)
    link = Link(machine(both=machine(shared_rate).h2d))
    held = []
    for way, num_bytes, ready, now in handed_over:
        for copying in held:
            link.is_over(copying, now)  # time is played up to now: what comes later may not change what was
        held.append(link.copy(link.h2d if way else link.d2h, num_bytes, ready))
    ends = [link.end_s(copying) for copying in held]
    assert ends == pytest.approx(ticking(handed_over, shared_rate), abs=TICK_S * 3 * (len(ends) + 1))


@thorough
@given(copies)
def test_ways_that_do_not_disturb_each_other_go_on_alone(drawn):
    handed_over = in_time(drawn)
    eager, played = Link(machine()), Link(machine(both=machine().h2d))
    both = [
        [link.copy(link.h2d if way else link.d2h, num_bytes, ready) for way, num_bytes, ready, _ in handed_over]
        for link in (eager, played)
    ]
    assert [eager.end_s(c) for c in both[0]] == pytest.approx([played.end_s(c) for c in both[1]], abs=1e-6)
