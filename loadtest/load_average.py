"""The load average of this machine. It shows whether other programs distort the latencies of a run."""

import os
from typing import Self

import msgspec


class LoadAverage(msgspec.Struct, kw_only=True):
    """The mean number of processes that ran or waited for a core, in the last minute."""

    start: float
    end: float
    cores: int

    @classmethod
    def begin(cls) -> Self:
        """Return the load average at the start of a run."""
        now = os.getloadavg()[0]
        return cls(start=now, end=now, cores=os.cpu_count() or 1)

    def update(self) -> Self:
        """Set the load average at the end of the run, and return this object."""
        self.end = os.getloadavg()[0]
        return self

    def __str__(self) -> str:
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        text = f"Load average: {self.start:.1f} at the start, {self.end:.1f} at the end, {cores}."
        if self.start > self.cores:
            text += " Other programs used the machine, so latencies cannot be compared with those of other runs."
        return text
