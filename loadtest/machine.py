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
KINDS = {"postgres": "PostgreSQL", "valkey-server": "Valkey", "redis-server": "Redis"}
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

    def usage(self, *, memory: bool = False) -> Usage:
        """Return the CPU time used until now, and with `memory` also the memory in use."""
        stats = _stats()
        ours = set(self._roots)
        grew = True
        while grew:
            new = {pid for pid, one in stats.items() if one.parent in ours} - ours
            ours |= new
            grew = bool(new)
        cpu: dict[str, float] = defaultdict(float)
        held: dict[str, int] = defaultdict(int)
        for pid in ours & stats.keys():
            one = stats[pid]
            kind = KINDS.get(one.name, "server")
            # The CPU time of ended children belongs to their parent. The server's children are counted while they live.
            cpu[kind] += one.seconds + (one.ended_seconds if kind == "PostgreSQL" else 0)
            if memory:
                held[kind] += _pss(pid)
        return Usage(cpu, held)


class _Stat(NamedTuple):
    name: str
    parent: int
    seconds: float
    ended_seconds: float


def _stats() -> dict[int, _Stat]:
    found = {}
    for path in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, tail = path.read_text().rpartition(")")
            fields = tail.split()
            own, ended = (int(fields[11]) + int(fields[12])), (int(fields[13]) + int(fields[14]))
            found[int(path.parent.name)] = _Stat(head.partition("(")[2], int(fields[1]), own / TICKS, ended / TICKS)
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
