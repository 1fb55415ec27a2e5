"""Prometheus metrics, in base units, on a registry of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.decode_node import DecodeNode
from proxy.ledger import Entry
from proxy.prefill_node import PrefillNode
from proxy.regret import Regret

_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_KL_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
_ERROR_BUCKETS = (-0.75, -0.5, -0.25, -0.1, -0.05, 0, 0.05, 0.1, 0.25, 0.5, 1, 3)
_REGRET_BUCKETS = (0, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 3)
_NS_PER_S = 1e9


class Metrics:
    """What ``GET /metrics`` shows; gauges read their values when asked."""

    def __init__(
        self,
        *,
        running: Callable[[], float],
        queued: Callable[[], float],
        prefill_up: Callable[[], float],
        decode_up: Callable[[], float],
        prefill_nodes: Callable[[], Iterable[PrefillNode]],
        workers: Callable[[], Iterable[DecodeNode]],
        alarms: Callable[[], float],
        unwritten: Callable[[], float],
    ) -> None:
        self._registry = registry = CollectorRegistry()
        self._ttft = Histogram(
            "isthmus_time_to_first_token_seconds",
            "From the request's arrival to its first text",
            ["route"],
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self._gap = Histogram(
            "isthmus_inter_token_latency_seconds",
            "Gap between two pieces of text",
            ["route"],
            buckets=_GAP_BUCKETS,
            registry=registry,
        )
        self._kv_seconds = Histogram(
            "isthmus_kv_transfer_seconds",
            "From the first KV frame to the last",
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self._kv_bytes = Counter(
            "isthmus_kv_transfer_bytes", "KV before and after encoding", ["kind"], registry=registry
        )
        self._routes = Counter("isthmus_route", "Requests by route taken", ["route", "reason"], registry=registry)
        self._failovers = Counter(
            "isthmus_failover",
            "Times that a request went on after a node had failed it",
            ["code"],
            registry=registry,
        )
        self._requests = Counter("isthmus_requests", "Finished requests by outcome", ["status"], registry=registry)
        self._gain = Summary(
            "isthmus_specialization_gain_seconds",
            "Estimated CPU prefill minus prefill and exposed transfer",
            registry=registry,
        )
        # The sum above falls where splitting loses, which rate() takes for a restart: these two only rise.
        self._gained = Counter(
            "isthmus_specialization_gained_seconds", "What splitting gained, where it did", ["codec"], registry=registry
        )
        self._lost = Counter(
            "isthmus_specialization_lost_seconds", "What splitting lost, where it did", ["codec"], registry=registry
        )
        self._reused = Counter("isthmus_kv_reused_tokens", "Prompt tokens whose KV the worker had", registry=registry)
        self._reuse_saved = Counter(
            "isthmus_kv_reuse_saved_seconds",
            "Estimated CPU prefill of the tokens whose KV was there, less bringing it back",
            registry=registry,
        )
        self._parity_kl = Histogram(
            "isthmus_parity_kl_nats",
            "Next token's distribution after KV from the wire, against the worker's own KV",
            ["codec"],
            buckets=_KL_BUCKETS,
            registry=registry,
        )
        self._error = Histogram(
            "isthmus_estimate_error_ratio",
            "What the router predicted for the route taken, over what it took, minus 1",
            ["route", "what"],
            buckets=_ERROR_BUCKETS,
            registry=registry,
        )
        self._regret = Histogram(
            "isthmus_regret_ratio",
            "How much longer a request took than by the best route that is known for it, over that",
            buckets=_REGRET_BUCKETS,
            registry=registry,
        )
        self._shadows = Counter("isthmus_shadows", "Requests run again on another route", ["status"], registry=registry)
        for name, text, read in (
            ("isthmus_running", "Requests that hold a slot", running),
            ("isthmus_queued", "Requests that wait for a slot", queued),
            ("isthmus_prefill_up", "1 if some prefill node answers", prefill_up),
            ("isthmus_decode_up", "1 if some decode worker takes requests", decode_up),
            ("isthmus_parity_alarms", "Codecs that are switched off for a worker because KV came out wrong", alarms),
            ("isthmus_ledger_unwritten", "Entries and changes that the ledger's file could not take", unwritten),
        ):
            Gauge(name, text, registry=registry).set_function(read)
        registry.register(_PrefillNodes(prefill_nodes))
        registry.register(_Workers(workers))

    def gap(self, route: str, gap_ns: int) -> None:
        """One gap between two pieces of text."""
        self._gap.labels(route).observe(gap_ns / _NS_PER_S)

    def refused(self, status: str) -> None:
        """A request that never got a ledger entry."""
        self._requests.labels(status).inc()

    def finished(self, entry: Entry) -> None:
        """Everything a closed ledger entry says; of a shadow only how good the prediction was."""
        for what, error in (("ttft", entry.ttft_error), ("e2e", entry.e2e_error)):
            if error is not None:
                self._error.labels(entry.route, what).observe(error)
        if entry.shadow_of:
            self._shadows.labels(entry.status).inc()
            return
        self._requests.labels(entry.status).inc()
        for failed in entry.attempts[:-1]:
            self._failovers.labels(failed.error).inc()
        if entry.route is None:
            return
        self._routes.labels(entry.route, entry.reason).inc()
        if entry.ttft_ns is not None:
            self._ttft.labels(entry.route).observe(entry.ttft_ns / _NS_PER_S)
        if entry.kv_raw_bytes:
            self._kv_seconds.observe(entry.wire_ns / _NS_PER_S)
            self._kv_bytes.labels("raw").inc(entry.kv_raw_bytes)
            self._kv_bytes.labels("wire").inc(entry.kv_wire_bytes)
        if entry.kv_reused_tokens:
            self._reused.inc(entry.kv_reused_tokens)
            self._reuse_saved.inc(max(0, entry.reuse_saved_ns or 0) / _NS_PER_S)
        if entry.specialization_gain_ns is not None:
            gain_s = entry.specialization_gain_ns / _NS_PER_S
            self._gain.observe(gain_s)
            self._gained.labels(entry.codec).inc(max(gain_s, 0.0))
            self._lost.labels(entry.codec).inc(max(-gain_s, 0.0))

    def regretted(self, regret: Regret) -> None:
        """What a request took has been compared with other routes."""
        self._regret.observe(regret.ns / max(1, regret.best_ns))

    def compared(self, codec: str, kl: float) -> None:
        """The parity guard has made a comparison."""
        self._parity_kl.labels(codec).observe(kl)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self._registry)


class _PrefillNodes(Collector):
    """What is known of each prefill node; no sample of a power that is not known."""

    def __init__(self, nodes: Callable[[], Iterable[PrefillNode]]) -> None:
        self._nodes = nodes

    def collect(self) -> Iterator[Metric]:
        labels = ["node"]
        up = GaugeMetricFamily("isthmus_prefill_node_up", "1 if the prefill node answers", labels=labels)
        backlog = GaugeMetricFamily(
            "isthmus_prefill_backlog_seconds",
            "What its prefills that have begun are expected to take yet",
            labels=labels,
        )
        watts = GaugeMetricFamily("isthmus_prefill_watts", "Mean power of what runs the prefill", labels=["node", "of"])
        for node in self._nodes():
            up.add_metric([node.name], float(node.up))
            backlog.add_metric([node.name], node.load.backlog.ns / _NS_PER_S)
            if node.power:
                watts.add_metric([node.name, node.power.of], node.power.watts)
        yield from (up, backlog, watts)


class _Workers(Collector):
    """What each worker last said of itself: every number in its Status, and whether it takes requests."""

    def __init__(self, workers: Callable[[], Iterable[DecodeNode]]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("isthmus_worker_up", "1 if the decode worker takes requests", labels=["worker"])
        told: dict[str, GaugeMetricFamily] = {}
        for node in self._workers():
            up.add_metric([node.name], float(node.takes_requests))
            for field, value in (msgspec.structs.asdict(node.status) if node.status else {}).items():
                if isinstance(value, int | float):
                    name = f"isthmus_worker_{field}"
                    text = f"The decode worker's {field.replace('_', ' ')}"
                    told.setdefault(name, GaugeMetricFamily(name, text, labels=["worker"]))
                    told[name].add_metric([node.name], float(value))
            for tier in node.status.tiers if node.status else ():
                for field, value in msgspec.structs.asdict(tier).items():
                    name = f"isthmus_worker_tier_{field}"
                    if isinstance(value, int | float):
                        text = f"The {field.replace('_', ' ')} of a tier of the decode worker's KV pool"
                        told.setdefault(name, GaugeMetricFamily(name, text, labels=["worker", "tier"]))
                        told[name].add_metric([node.name, tier.name], float(value))
                    elif isinstance(value, dict):
                        text = f"Blocks that a tier of the decode worker's KV pool has {field}, by reason"
                        told.setdefault(name, GaugeMetricFamily(name, text, labels=["worker", "tier", "reason"]))
                        for reason, count in value.items():
                            told[name].add_metric([node.name, tier.name, reason], float(count))
        yield up
        yield from told.values()
