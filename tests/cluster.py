"""Workers in separate processes, started as the supervisor starts them, which a test can kill."""

import asyncio
from pathlib import Path

from server.core.config import Settings
from server.processes.supervisor import Worker, listen


class Cluster:
    """Several workers, each on its own port."""

    def __init__(self, settings: Settings, folder: Path, count: int) -> None:
        self.workers = [
            Worker(settings, number, listen("127.0.0.1", 0, 1)[0], folder) for number in range(1, count + 1)
        ]

    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{worker.listener.getsockname()[1]}" for worker in self.workers]

    async def start(self, *workers: Worker) -> None:
        for worker in workers:
            worker.start()
        for worker in workers:
            await asyncio.to_thread(worker.wait_ready)

    def stop(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.listener.close()
