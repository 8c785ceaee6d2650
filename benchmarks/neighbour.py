"""A noisy neighbour: a process that uses half of a core, and replaces what the caches of the processor hold."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator

BLOCK = 32 * 1024 * 1024
"""Bytes copied at a time, more than the second-level cache of a core."""


@contextlib.contextmanager
def neighbour() -> Iterator[None]:
    """Run the neighbour while the context is entered. It ends with this process, whatever ends that."""
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(os.getpid(),), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _run(parent: int) -> None:
    block, other = bytearray(BLOCK), bytearray(BLOCK)
    while os.getppid() == parent:
        began = time.perf_counter()
        other[:] = block
        time.sleep(time.perf_counter() - began)
