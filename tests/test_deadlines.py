"""`Deadlines` maps keys to times. Past times are removed before they are many, and others are kept."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from protocol.ids import UserId, uuid7
from server.core import deadlines
from server.core.deadlines import Deadlines
from server.core.throttle import Throttle
from server.limits.admission import Admission
from server.limits.retries import Retries
from server.limits.token_bucket import Pace, TokenBuckets


def test_past_times_are_removed_and_others_are_kept() -> None:
    times: Deadlines[int, int] = Deadlines()
    for key in range(deadlines.SWEEP_AT):
        times.put(key, 10**9 if key % 4 == 0 else key, now=0)
    kept = deadlines.SWEEP_AT // 4
    for now in range(deadlines.SWEEP_AT, 20 * deadlines.SWEEP_AT):
        times.put(now, now + 1, now)
        assert len(times) <= deadlines.SWEEP_AT + 1
    assert [times.get(key, 10**6) for key in range(0, deadlines.SWEEP_AT, 4)] == [10**9] * kept
    assert times.get(1, 10**6) == 10**6, "a past time reads as now"
    for key in range(3 * deadlines.SWEEP_AT):
        times.put(-key, 10**9, 10**6)
    assert len(times) >= 3 * deadlines.SWEEP_AT + kept - 1
    for now in range(10**9 + 1, 10**9 + 10 * deadlines.SWEEP_AT):
        times.put(now, now + 1, now)
    assert len(times) <= deadlines.SWEEP_AT + 1
    times.clear()
    assert len(times) == 0


def _refused(admission: Admission, client: Any) -> None:
    admission._later(client)  # noqa: SLF001


@pytest.mark.parametrize(
    "use",
    [
        lambda clock: TokenBuckets("frames", rate=1.0, burst=2, clock=clock).take,
        lambda clock: (lambda one, key: one.charge(key, 1)).__get__(TokenBuckets("frames", 1.0, burst=2, clock=clock)),
        lambda clock: (lambda one, key: one.after(key, 1, 1)).__get__(Retries(Pace.of(1.0), clock=clock)),
        lambda clock: _refused.__get__(Admission(clock=clock)),
        lambda clock: Throttle(clock=clock).passes,
    ],
    ids=["TokenBuckets", "charge", "Retries", "Admission", "Throttle"],
)
def test_every_store_of_times_per_client_removes_past_times(
    use: Callable[[Callable[[], int]], Callable[[UserId], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Deadlines[Any, Any]] = []
    real = Deadlines.__init__

    def noted(self: Deadlines[Any, Any]) -> None:
        real(self)
        made.append(self)

    monkeypatch.setattr(Deadlines, "__init__", noted)
    monkeypatch.setattr(deadlines, "SWEEP_AT", 10)
    times = itertools.count(step=10**11)
    done = use(lambda: next(times))
    for _ in range(200):
        done(UserId(uuid7()))
    (times_of,) = made
    assert 0 < len(times_of) <= 11
