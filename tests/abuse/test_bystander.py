"""The bystander detects a slow server, and reports nothing without an attack."""

import asyncio
import signal

import pytest

from tests.abuse.conftest import Scene

pytestmark = pytest.mark.more


async def test_bystander_notices_a_server_that_freezes_repeatedly(scene: Scene) -> None:
    process = scene.worker.process
    assert process is not None

    async def freeze() -> None:
        try:
            while True:
                process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(0.25)
                process.send_signal(signal.SIGCONT)
                await asyncio.sleep(0.25)
        finally:
            process.send_signal(signal.SIGCONT)

    with pytest.raises(AssertionError, match="attacked"):
        await scene.bystander.is_unaffected(freeze, seconds=1.0)


async def test_bystander_is_unaffected_without_an_attack(scene: Scene) -> None:
    await scene.bystander.is_unaffected(lambda: asyncio.sleep(60), seconds=1.0)
