from __future__ import annotations

from measurements.decode_latency import gaps_ns
from measurements.decode_worker import Stream
from transfer.messages import Landing, Ticket


def test_gaps_share_a_message_of_several_tokens() -> None:
    landing = Landing(cell_type="f16", rope_order="half")
    ticket = Ticket(
        request_id="r",
        ticket="0" * 32,
        kv_endpoint="",
        codec="raw",
        landing=landing,
        chunk_tokens=1,
        credit_chunks=1,
        deadline_ms=1,
    )
    stream = Stream(ticket, 1)
    stream.times_ns, stream.counts = [0, 10, 40, 50], [1, 1, 3, 1]
    assert gaps_ns(stream) == [10, 10, 10]
