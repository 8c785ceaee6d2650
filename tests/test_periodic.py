"""Jobs: when they begin, and that they end."""

import asyncio
import logging
import random
import re
from pathlib import Path

import pytest

from server import periodic
from server.periodic import end, every

SERVER = Path(__file__).parent.parent / "server"


async def test_a_job_that_fails_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    done = asyncio.Event()
    tries = iter((ValueError("once"), None))

    async def job() -> None:
        if (error := next(tries, None)) is not None:
            raise error
        done.set()

    task = asyncio.create_task(every(0, job))
    with caplog.at_level(logging.ERROR):
        await asyncio.wait_for(done.wait(), 5)
    await end([task])
    assert "failed" in caplog.text
    assert task.cancelled()


async def test_workers_that_start_together_begin_their_jobs_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    done = asyncio.Event()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def job() -> None:
        done.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(random, "random", lambda: 0.25)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    for is_spread, expected in ((True, [15.0]), (False, [])):
        slept.clear()
        done.clear()
        task = asyncio.create_task(every(60, job, is_spread=is_spread))
        await done.wait()
        await end([task])
        assert slept == expected


async def test_a_job_that_swallows_its_cancellation_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(periodic, "SWALLOWED_SECONDS", 0.01)
    swallowed = 0
    begun = asyncio.Event()

    async def job() -> None:
        nonlocal swallowed
        try:
            begun.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            swallowed += 1
            if swallowed == 3:
                raise

    task = asyncio.create_task(every(0, job))
    await begun.wait()
    await asyncio.wait_for(end([task]), 5)
    assert (task.cancelled(), swallowed) == (True, 3)


def test_no_task_is_awaited_after_one_cancellation() -> None:
    once = re.compile(
        r"\.cancel\(\)\n\s+(with contextlib\.suppress\(asyncio\.CancelledError\):\n\s+)?await (?!asyncio)"
    )
    for path in SERVER.rglob("*.py"):
        assert not once.search(path.read_text()), f"{path.name}: use server.periodic.end"
