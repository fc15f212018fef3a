"""Requests: how many are under way at once, and that none is when an error is told."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from lightning_superpipe.tiers.requests import Requests


@pytest.mark.parametrize("num_at_once", [1, 2, 4])
def test_as_many_are_under_way_as_allowed_and_no_more(num_at_once: int) -> None:
    meeting = threading.Barrier(num_at_once)  # nobody passes it alone
    lock, under_way, most = threading.Lock(), 0, 0

    def request(number: int) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        if number < num_at_once:
            meeting.wait(timeout=30)
        time.sleep(0.001)
        with lock:
            under_way -= 1

    requests = Requests(num_at_once)
    requests.run([partial(request, number) for number in range(3 * num_at_once)])
    requests.close()
    assert most == num_at_once


@pytest.mark.parametrize("num_at_once", [1, 2, 4])
@pytest.mark.parametrize("failing", [0, 1, 5])
def test_an_error_is_told_when_nothing_is_under_way_any_more(num_at_once: int, failing: int) -> None:
    under_way: set[int] = set()

    def request(number: int) -> None:
        under_way.add(number)
        try:
            time.sleep(0.002 * (7 - number))
            if number == failing:
                raise OSError(f"request {number} failed")
        finally:
            under_way.discard(number)

    requests = Requests(num_at_once)
    with pytest.raises(OSError, match=f"request {failing} failed"):
        requests.run([partial(request, number) for number in range(7)])
    assert not under_way
    requests.run([])
    requests.close()
