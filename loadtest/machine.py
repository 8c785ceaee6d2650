"""CPU time and memory of the server's processes, if they run on this machine. Read from /proc (Linux)."""

import contextlib
import os
import socket
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

TICKS = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")
POSTGRESQL = "PostgreSQL"
KINDS = {"postgres": POSTGRESQL, "valkey-server": "Valkey", "redis-server": "Redis"}
LISTENING = "0A"
"""The state LISTEN in /proc/net/tcp."""


class Usage(NamedTuple):
    """CPU seconds and bytes of memory (proportional set size), by kind of process."""

    cpu: dict[str, float]
    memory: dict[str, int]

    @property
    def seconds(self) -> float:
        """The total CPU time, in seconds."""
        return sum(self.cpu.values())


class Machine:
    """Some processes and all of their descendants."""

    def __init__(self, roots: Collection[int]) -> None:
        self._roots = set(roots)
        self._seen: dict[_Identity, _Stat] = {}
        self._ended: dict[str, float] = defaultdict(float)
        """CPU seconds of processes that have ended since the first call of `usage`, by kind."""

    def usage(self, *, memory: bool = False) -> Usage:
        """Return the CPU time used until now, and with `memory` also the memory in use.

        A process that has ended keeps the CPU time of the last call, so the sum never decreases.
        """
        ours = self._ours()
        alive = {one.pid for one in ours}
        for gone in self._seen.keys() - ours.keys():
            one = self._seen[gone]
            if one.kind != POSTGRESQL or one.parent not in alive:
                self._ended[one.kind] += one.counted_seconds
        self._seen = ours
        cpu, held = self._ended.copy(), defaultdict[str, int](int)
        for identity, one in ours.items():
            cpu[one.kind] += one.counted_seconds
            if memory:
                held[one.kind] += _pss(identity.pid)
        return Usage(cpu, held)

    def _ours(self) -> "dict[_Identity, _Stat]":
        """Return the roots and their descendants."""
        stats = _stats()
        ours = self._roots & stats.keys()
        new = ours
        while new:
            new = {pid for pid, one in stats.items() if one.parent in ours} - ours
            ours |= new
        return {_Identity(pid, stats[pid].began): stats[pid] for pid in ours}


class _Identity(NamedTuple):
    """A process. Another one may get its id later."""

    pid: int
    began: int


class _Stat(NamedTuple):
    kind: str
    parent: int
    began: int
    """Clock ticks since the machine started."""
    seconds: float
    ended_seconds: float

    @property
    def counted_seconds(self) -> float:
        """CPU time of the process. PostgreSQL has that of its ended children, whose last moments nobody sees."""
        return self.seconds + (self.ended_seconds if self.kind == POSTGRESQL else 0)


def _stats() -> dict[int, _Stat]:
    found = {}
    for path in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, tail = path.read_text().rpartition(")")
            fields = tail.split()
            own, ended = (int(fields[11]) + int(fields[12])), (int(fields[13]) + int(fields[14]))
            kind = KINDS.get(head.partition("(")[2], "server")
            found[int(path.parent.name)] = _Stat(kind, int(fields[1]), int(fields[19]), own / TICKS, ended / TICKS)
    return found


def _pss(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def behind(port: int) -> Machine:
    """Return the processes that listen on a port of this machine, or none if /proc does not show them."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    holders = set()
    for path in PROC.glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            if any(str(one.readlink()) in inodes for one in path.iterdir()):
                holders.add(int(path.parent.name))
    stats = _stats()
    return Machine([pid for pid in holders if pid in stats and stats[pid].parent not in holders])


def is_here(host: str) -> bool:
    """Return whether an address belongs to this machine."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True
