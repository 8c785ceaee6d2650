"""An OpenChat that is started for a run, with its own PostgreSQL and Valkey, in a folder that is deleted after it."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self
from urllib.parse import quote

from loadtest.target import Unusable

START_SECONDS = 60.0
STOP_SECONDS = 60.0
POLL_SECONDS = 0.05


class Installation:
    """The command `openchat` and its processes, while it is entered."""

    def __init__(self, workers: int, settings: Mapping[str, str]) -> None:
        """`settings` are environment variables."""
        self._workers = workers
        self._settings = settings
        self._folder = Path(tempfile.mkdtemp(prefix="openchat-run-"))
        self._folder.chmod(0o755)  # root starts PostgreSQL as another user
        self._data = self._folder / "data"
        self._process: subprocess.Popen[bytes]
        self.run = self._data / "run"  # see docs/operations.md
        self.log = self._folder / "openchat.log"
        self.url = ""
        self.database_url = (
            settings.get("DATABASE_URL") or f"postgresql://openchat@/openchat?host={quote(str(self.run))}"
        )
        self.redis_url = f"unix://{self.run}/valkey.sock"

    async def __aenter__(self) -> Self:
        """Start it. Raises Unusable, with its log, if it does not start."""
        outside = {name: value for name, value in os.environ.items() if name not in {"DATABASE_URL", "REDIS_URL"}}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603, ASYNC220 - our own program, without a wait
                [sys.executable, "-P", "-m", "server.cli.main", "--port", "0", "--workers", str(self._workers)],
                stdout=log, stderr=subprocess.STDOUT, process_group=0,
                env=outside | {"OPENCHAT_DATA_DIR": str(self._data)} | dict(self._settings),
            )  # fmt: skip
        try:
            await self._listening()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, STOP_SECONDS)
        finally:  # also after Ctrl-C
            self._process.kill()
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _listening(self) -> None:
        """Wait until the supervisor has printed its URL. Raises Unusable, with its log, if it ends before that."""
        async with asyncio.timeout(START_SECONDS):
            while not self.url:
                if self._process.poll() is not None:
                    raise Unusable(f"openchat does not start: {self.log.read_text().strip()}")
                await asyncio.sleep(POLL_SECONDS)
                for line in self.log.read_text().splitlines():
                    if line.strip().startswith("listening"):
                        self.url = line.split()[1]

    @property
    def pid(self) -> int:
        """The process id of the supervisor."""
        return self._process.pid
