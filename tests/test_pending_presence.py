"""Announcements of presence: a caller waits only for the announcement that contains its user."""

import asyncio
from collections.abc import Mapping

import pytest

from protocol.ids import UserId, uuid7
from server.domain import pending_presence
from server.domain.pending_presence import PendingPresence, PresenceNews, Reason


def user() -> UserId:
    return UserId(uuid7())


class Announced:
    """The announcements that were made. Each one makes another due, as in a storm of arrivals."""

    def __init__(self) -> None:
        self.made: list[list[UserId]] = []
        self.pending = PendingPresence(self._announce)
        self.is_storm = True

    def keep(self, count: int = 1) -> list[UserId]:
        ids = [user() for _ in range(count)]
        for one in ids:
            self.pending.keep(one, PresenceNews(Reason.DEVICE))
        return ids

    async def _announce(self, news: Mapping[UserId, PresenceNews]) -> None:
        self.made.append(list(news))
        if self.is_storm:
            self.keep()
        await asyncio.sleep(0)


async def test_frame_waits_for_one_announcement_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending_presence, "USERS_PER_ANNOUNCEMENT", 3)
    told = Announced()
    others, (mine,) = told.keep(6), told.keep()
    async with asyncio.timeout(5):
        assert await told.pending.tell(mine)
    assert told.made == [[mine, *others[:2]]]
    # A job announces the others, and runs again while a full announcement is due.
    assert await told.pending.tell_due()
    told.is_storm = False
    assert not await told.pending.tell_due()
    assert told.made[1] == others[2:5]
    assert [len(one) for one in told.made] == [3, 3, 3]
    assert not told.pending
    assert await told.pending.tell(mine)
    assert len(told.made) == 3, "no announcement is due"


async def test_concurrent_frames_share_an_announcement() -> None:
    told = Announced()
    theirs = told.keep(4)
    async with asyncio.timeout(5):
        assert all(await asyncio.gather(*(told.pending.tell(one) for one in theirs)))
    assert sorted(one for made in told.made for one in made if one in theirs) == sorted(theirs)
    assert len(told.made) <= 2
