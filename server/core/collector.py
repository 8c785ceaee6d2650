"""The work of Python's garbage collector in this process."""

import gc
import time


class Collector:
    """Measures the time that the garbage collector takes, during which the worker does nothing else."""

    def __init__(self) -> None:
        self._began = 0.0
        self._seconds = 0.0

    def start(self) -> None:
        """Begin to measure."""
        gc.callbacks.append(self._note)

    def stop(self) -> None:
        """End measuring."""
        gc.callbacks.remove(self._note)

    def values(self) -> dict[str, float]:
        """Return the collections, the objects that they deleted, and their seconds. The first two are those of the
        whole process.
        """
        generations = gc.get_stats()
        return {
            "gc_collections": sum(one["collections"] for one in generations),
            "gc_collected": sum(one["collected"] for one in generations),
            "gc_seconds": self._seconds,
        }

    def _note(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        else:
            self._seconds += time.perf_counter() - self._began
