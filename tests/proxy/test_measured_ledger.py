"""`isthmus measure ledger` against a proxy that runs."""

from __future__ import annotations

from measurements import ledger, ledger_entries
from tests.proxy.conftest import Stack


def test_a_proxys_own_ledger_is_read_and_summed_up(stack: Stack) -> None:
    for route in ("split", "gpu", "cpu"):
        stack.chat({"X-Isthmus-Route": route, "X-Isthmus-Codec": "q8"})
    entries = ledger_entries.read(stack.url)
    assert [entry.way for entry in entries] == ["split q8", "gpu", "cpu"]
    assert ledger_entries.read(f"{stack.url}/ledger") == entries
    found = ledger.summarize(entries)
    assert {way: row["counted"] for way, row in found["ways"].items()} == {"split q8": 1, "gpu": 1, "cpu": 1}
    assert found["ways"]["split q8"]["kv_wire_bytes"] == entries[0].kv_wire_bytes > 0
    assert found["estimate_error"]["n"] == 1
