from __future__ import annotations

import psutil
import pytest

from measurements import decode_worker
from measurements.decode_worker import LiveWorker
from tests.proxy.conftest import free_port
from tests.proxy.fake_worker import FakeWorker
from transfer.messages import Ping


def test_a_worker_that_talks_for_long_hears_that_somebody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_worker, "PING_S", 0.02)
    port = free_port()
    fake = FakeWorker(f"tcp://127.0.0.1:{port}")
    fake.script.endless = True
    worker = LiveWorker(psutil.Process(), port)
    try:
        stream = worker.reserve(4, 1000, "local")
        worker.start(stream)
        while len(fake.heard(Ping)) < 3:
            worker.take_for(0.05)
        assert stream.counts
        # Answers that nobody asked for are not taken for the one to a question.
        asked = len(fake.heard(Ping))
        worker.status()
        assert len(fake.heard(Ping)) > asked
        worker.abort(stream)
    finally:
        worker.close()
        fake.close()
