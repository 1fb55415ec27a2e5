"""A worker's own process, as its cluster file starts it."""

from __future__ import annotations

import msgspec
import pytest

from measurements import decode
from measurements.decode_worker import live_worker


@pytest.mark.parametrize("mmap", [False, True])
def test_weights_are_the_files_pages_only_when_asked_for(default_pair, mmap: bool) -> None:
    setting = decode.setting(default_pair.gguf, "1", 40, 12)
    settings = {} if not mmap else {"mmap": True}
    with live_worker(setting.gguf, msgspec.structs.replace(setting.decode, **settings)) as worker:
        mapped = {each.path for each in worker.process.memory_maps()}
    assert (str(setting.gguf.resolve()) in mapped) is mmap
