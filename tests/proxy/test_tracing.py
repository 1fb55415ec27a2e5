"""Spans, as a collector gets them over OTLP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.proto.trace.v1.trace_pb2 import Status as SpanStatus

from proxy import tracing
from proxy.ledger import Account
from tests.proxy.conftest import Stack, free_port, make_cluster, running, wait_until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"
MS = 1_000_000


class Collector:
    """A real HTTP server that takes OTLP; ``spans`` holds what came."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.paths: list[str] = []
        self.resources: list[dict[str, str]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers["Content-Length"]))
                collector.paths.append(self.path)
                for resource_spans in ExportTraceServiceRequest.FromString(sent).resource_spans:
                    collector.resources.append(attributes(resource_spans.resource))
                    for scope_spans in resource_spans.scope_spans:
                        collector.spans += scope_spans.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def request(self, request_id: str) -> Span:
        """The span of that request, once it has come."""

        def found() -> list[Span]:
            return [span for span in self.spans if attributes(span).get("gen_ai.response.id") == request_id]

        wait_until(found)
        return found()[0]

    def stages(self, span: Span) -> dict[str, Span]:
        return {child.name: child for child in self.spans if child.parent_span_id == span.span_id}


def attributes(of: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@contextmanager
def traced(hf_dir: Path, endpoint: str) -> Iterator[Stack]:
    with running(make_cluster(hf_dir, otlp_endpoint=endpoint)) as stack:
        yield stack


def test_a_request_is_a_span_with_its_stages_below(hf_dir, collector):
    with traced(hf_dir, collector.url) as stack:
        headers = {"X-Request-Id": "one", "X-Isthmus-Route": "split", "traceparent": f"{PARENT}-01"}
        stack.chat(headers, temperature=0.5, max_tokens=7)
        span = collector.request("one")
        entry = stack.entries()[-1]
        stack.complete({"X-Request-Id": "two", "X-Isthmus-Route": "gpu"})
        other = collector.request("two")
        stack.prefill.script.refuse = (500, "out of order")
        stack.chat({"X-Request-Id": "three", "X-Isthmus-Route": "gpu"})
        failed = collector.request("three")
        stack.prefill.script.refuse = None
        stack.chat({"X-Request-Id": "four", "traceparent": f"{PARENT}-00"})
        stack.chat({"X-Request-Id": "five", "traceparent": "nonsense"})
        collector.request("five")
    assert span.name == "chat tiny"
    assert span.kind == Span.SPAN_KIND_SERVER
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == tuple(PARENT.split("-")[1:])
    said = attributes(span)
    assert said["gen_ai.operation.name"] == "chat"
    assert said["gen_ai.request.model"] == "tiny"
    assert said["gen_ai.request.max_tokens"] == 7
    assert said["gen_ai.request.temperature"] == 0.5
    assert said["gen_ai.usage.input_tokens"] == entry["prompt_tokens"]
    assert said["gen_ai.usage.output_tokens"] == entry["completion_tokens"]
    assert said["isthmus.route"] == "split"
    assert said["isthmus.kv.wire_bytes"] == entry["kv_wire_bytes"]
    assert span.end_time_unix_nano - span.start_time_unix_nano == entry["total_ns"]
    stages = collector.stages(span)
    assert {"queue", "tokenize", "reserve", "prefill", "transfer_exposed", "decode"} <= set(stages)
    prefill = stages["prefill"]
    assert prefill.end_time_unix_nano - prefill.start_time_unix_nano == entry["prefill_ns"]
    assert all(child.trace_id == span.trace_id for child in stages.values())
    assert attributes(other)["gen_ai.operation.name"] == "text_completion"
    assert other.trace_id != span.trace_id
    assert not other.parent_span_id
    assert failed.status.code == SpanStatus.STATUS_CODE_ERROR
    assert attributes(failed)["error.type"] == "engine_error"
    # Its caller said that it is not to be recorded.
    assert not [each for each in collector.spans if attributes(each).get("gen_ai.response.id") == "four"]
    assert set(collector.paths) == {"/v1/traces"}
    assert all(resource["service.name"] == "isthmus" for resource in collector.resources)


def test_what_waits_is_sent_at_the_end(hf_dir, collector, monkeypatch):
    monkeypatch.setattr(tracing, "EXPORT_EVERY_MS", 60_000)
    with traced(hf_dir, f"{collector.url}/somewhere/v1/traces") as stack:
        stack.chat({"X-Request-Id": "last words"[:4]})
        assert not collector.spans
    assert collector.request("last")
    assert collector.paths == ["/somewhere/v1/traces"]


def test_a_collector_that_is_not_there_costs_no_request(hf_dir):
    with traced(hf_dir, f"http://127.0.0.1:{free_port()}") as stack:
        assert stack.chat().status_code == 200


def test_stages_lie_as_the_client_waits_for_them():
    entry = msgspec.structs.replace(
        Account("r", "m").close("ok"),
        queue_ns=1 * MS,
        prefill_ns=10 * MS,
        transfer_exposed_ns=2 * MS,
        wire_ns=8 * MS,
        decode_ns=20 * MS,
    )
    assert list(tracing.stages(entry)) == [
        ("queue", 0, 1 * MS),
        ("prefill", 1 * MS, 10 * MS),
        ("transfer_exposed", 11 * MS, 2 * MS),
        ("wire", 5 * MS, 8 * MS),
        ("decode", 13 * MS, 20 * MS),
    ]
