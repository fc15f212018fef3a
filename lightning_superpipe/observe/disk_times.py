"""How long reads and writes of a run would have taken alone: at once they share the disk."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from lightning_superpipe.observe.trace import Lane, Span

__all__ = ["disk_seconds"]


def disk_seconds(spans: Iterable[Span]) -> dict[Lane, dict[int, float]]:
    """Return the median seconds of reads and of writes, by size, without what others took of the disk meanwhile.

    Of a moment in which several are under way, each gets an equal part: that is how they are predicted as well
    (:mod:`lightning_superpipe.planning.disk_queue`).

    >>> read, write = Span(Lane.READ, "P", 0, 0.0, 3.0, 10), Span(Lane.WRITE, "U", 1, 1.0, 5.0, 20)
    >>> disk_seconds([read, write]) == {Lane.READ: {10: 2.0}, Lane.WRITE: {20: 3.0}}
    True
    """
    moves = [span for span in spans if span.lane in (Lane.READ, Lane.WRITE) and span.num_bytes]
    times, own_s = _own_clock(moves)
    found: dict[Lane, defaultdict[int, list[float]]] = {lane: defaultdict(list) for lane in (Lane.READ, Lane.WRITE)}
    for span in moves:
        first, last = bisect_left(times, span.start_s), bisect_left(times, span.end_s)
        found[span.lane][span.num_bytes].append(own_s[last] - own_s[first])
    return {
        lane: {size: statistics.median(each) for size, each in sorted(by_size.items())}
        for lane, by_size in found.items()
    }


def _own_clock(moves: Sequence[Span]) -> tuple[list[float], list[float]]:
    """All moments at which something begins or ends, and what a clock shows then that stands for one of them: the more
    are under way, the slower it goes.
    """
    changes: defaultdict[float, int] = defaultdict(int)
    for span in moves:
        changes[span.start_s] += 1
        changes[span.end_s] -= 1
    times = sorted(changes)
    under_way = accumulate(changes[time_s] for time_s in times)
    passed = zip(pairwise(times), under_way, strict=False)  # behind the last moment nothing is under way
    return times, list(accumulate(((end - start) / max(count, 1) for (start, end), count in passed), initial=0.0))
