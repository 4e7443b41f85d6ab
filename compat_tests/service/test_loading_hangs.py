"""A model whose loading hangs: nobody ends it, but whoever reads the log sees what its process does."""

import asyncio
import os
import re
import signal
import stat

import pytest

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.service import engine_link, launch, process
from helix_gateway.service.settings import EngineSettings


class Log:
    def __init__(self):
        self.lines = []
        self.told_of_a_stop = asyncio.Event()

    def info(self, event, **fields):
        self.lines.append((event, fields))
        if len(self.lines) >= 3 and fields["process"] == "stopped":
            self.told_of_a_stop.set()


async def test_a_load_that_hangs_is_told_about_until_it_ends(tmp_path, monkeypatch):
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(hanging.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(launch, "ENGINE_COMMAND", (str(hanging),))
    monkeypatch.setattr(engine_link, "LOADING_TOLD_EVERY_S", 0.05)
    monkeypatch.setattr(engine_link, "log", log := Log())
    link = await process._start_engine(EngineSettings(model_path="none"))
    loading = asyncio.create_task(link.first_reply())
    os.kill(link.process.pid, signal.SIGSTOP)
    await asyncio.wait_for(log.told_of_a_stop.wait(), 20)
    assert {event for event, _ in log.lines} == {"engine_loading"}
    assert log.lines[2][1]["waited_s"] == pytest.approx(0.15)
    os.kill(link.process.pid, signal.SIGKILL)
    with pytest.raises(
        ModelLoadError, match=r"signal 9 ended it. The system does that where memory has run out, most likely"
    ) as told:
        await loading
    # The gateway does not know the device, and a GPU refuses those.
    assert not re.search("int[48]", str(told.value))
    await link.close()
