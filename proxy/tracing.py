"""Requests as OpenTelemetry traces, sent by OTLP over HTTP: a span for each, with one for every stage below it.

Names are those of the semantic conventions for generative AI
(https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/); what they lack begins with ``isthmus.``. A client's
``traceparent`` (https://www.w3.org/TR/trace-context/) is the parent, and decides whether the request is recorded.

Spans are made when the ledger entry is closed, from its durations: stages that the client waits for lie one after the
other, the transfer ends where the wait for it ends. Times of day are the proxy's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from proxy.ledger import Entry
from proxy.openai import Body, ChatBody

QUEUED_SPANS = 4096
EXPORT_SPANS = 512
EXPORT_EVERY_MS = 1000
EXPORT_S = 5.0
_IN_TURN = ("queue", "tokenize", "route", "reserve", "prefill", "transfer_exposed", "decode")
_TRACES_PATH = "/v1/traces"


class Trace(NamedTuple):
    """What a request says for its trace: headers of W3C's trace context, and attributes of its span."""

    carrier: dict[str, str]
    attributes: dict[str, Any]


class Stage(NamedTuple):
    """A stage as a span, in ns after the request came."""

    name: str
    begin_ns: int
    length_ns: int


class Tracing:
    """Sends spans to the collector at ``endpoint``; ``/v1/traces`` is added if it has no path.

    Spans wait in a bounded queue for a thread that sends them; what does not fit is dropped.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        # OpenTelemetry is slow to import and few ask for it.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        scheme, _, rest = endpoint.rstrip("/").partition("://")
        url = f"{scheme}://{rest}" if "/" in rest else f"{scheme}://{rest}{_TRACES_PATH}"
        self._model = model
        self._provider = TracerProvider(resource=Resource.create({"service.name": "isthmus"}), shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                OTLPSpanExporter(endpoint=url, timeout=EXPORT_S),
                max_queue_size=QUEUED_SPANS,
                max_export_batch_size=EXPORT_SPANS,
                schedule_delay_millis=EXPORT_EVERY_MS,
            )
        )
        self._tracer = self._provider.get_tracer("isthmus.proxy")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, entry: Entry, trace: Trace) -> None:
        """Make the spans of a request that has just been closed."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        ended_ns = time.time_ns()
        began_ns = ended_ns - entry.total_ns
        span = self._tracer.start_span(
            f"{trace.attributes['gen_ai.operation.name']} {self._model}",
            context=self._propagator.extract(trace.carrier),
            kind=SpanKind.SERVER,
            start_time=began_ns,
            attributes=trace.attributes | _attributes(entry),
        )
        if span.is_recording():
            if entry.status != "ok":
                span.set_attribute("error.type", entry.status)
                span.set_status(Status(StatusCode.ERROR))
            context = set_span_in_context(span)
            for stage in stages(entry):
                begin_ns = began_ns + stage.begin_ns
                child = self._tracer.start_span(stage.name, context=context, start_time=begin_ns)
                child.end(begin_ns + stage.length_ns)
        span.end(ended_ns)

    def close(self) -> None:
        """Send what waits; takes as long as the collector, but not for ever."""
        self._provider.shutdown()


def describe(body: Body, carrier: dict[str, str]) -> Trace:
    """What a request asks for; ``carrier`` has its headers ``traceparent`` and ``tracestate``, if any."""
    asked = {
        "gen_ai.operation.name": "chat" if isinstance(body, ChatBody) else "text_completion",
        "gen_ai.request.max_tokens": body.token_limit,
        "gen_ai.request.temperature": body.temperature,
        "gen_ai.request.top_p": body.top_p,
        "gen_ai.request.seed": body.seed,
        "gen_ai.request.choice.count": body.choices if body.choices > 1 else None,
        "gen_ai.request.stream": bool(body.stream),
    }
    return Trace(carrier, {name: value for name, value in asked.items() if value is not None})


def stages(entry: Entry) -> Iterator[Stage]:
    """The stages of ``entry`` that took any time."""
    now_ns = 0
    for name in _IN_TURN:
        length_ns = getattr(entry, f"{name}_ns")
        if length_ns:
            yield Stage(name, now_ns, length_ns)
        now_ns += length_ns
        if name == "transfer_exposed" and entry.wire_ns:
            yield Stage("wire", max(0, now_ns - entry.wire_ns), min(now_ns, entry.wire_ns))


def _attributes(entry: Entry) -> dict[str, Any]:
    known = {
        "gen_ai.provider.name": "isthmus",
        "gen_ai.request.model": entry.model,
        "gen_ai.response.model": entry.model,
        "gen_ai.response.id": entry.request_id,
        "gen_ai.usage.input_tokens": entry.prompt_tokens,
        "gen_ai.usage.output_tokens": entry.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": entry.kv_reused_tokens,
        "isthmus.route": entry.route,
        "isthmus.reason": entry.reason,
        "isthmus.worker": entry.worker,
        "isthmus.codec": entry.codec,
        "isthmus.prefill_node": entry.prefill_node,
        "isthmus.attempts": len(entry.attempts),
        "isthmus.ledger.seq": entry.seq,
        "isthmus.kv.raw_bytes": entry.kv_raw_bytes,
        "isthmus.kv.wire_bytes": entry.kv_wire_bytes,
        "gen_ai.response.time_to_first_chunk": None if entry.ttft_ns is None else entry.ttft_ns / 1e9,
        "isthmus.specialization_gain_ns": entry.specialization_gain_ns,
    }
    return {name: value for name, value in known.items() if value is not None}
