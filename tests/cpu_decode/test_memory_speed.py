from __future__ import annotations

import pytest

from cpu_decode import memory_speed


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_read(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_speed, "ARRAY_BYTES", 8 << 20)
    assert 1e8 < memory_speed.read_bytes_per_s(threads) < 1e13
