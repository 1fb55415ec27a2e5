"""What `isthmus measure` has found on this cluster's machines, as observations to start the estimates from.

Looked for in the folder ``[proxy] measurements``: ``prefill.json``, ``decode.json``, ``crossover.json``, ``codec.json``
and ``link.json``, each an envelope ``isthmus.measure/1`` whose summary has stable names. A file of another model,
another machine or another form is left out, with one line in the log. `measure prefill` and, unless told otherwise,
`measure decode` run the model that the package brings along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from proxy import result_files
from proxy.result_files import (
    Codec,
    Crossover,
    Envelope,
    Link,
    Rates,
    UnfitError,
    is_local,
    kv_bytes_per_token,
    require_host,
    require_model,
    summary_of,
)
from transfer.codecs import CODECS
from transfer.config import Cluster

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
# The ways whose times the router wants, as the results name them.
_EXPORT, _WORKER = "connector, KV exported", "isthmus"
_RAW_BITS = 16

log = structlog.get_logger()


class Seen(NamedTuple):
    """Work of the size ``terms``, as the learner it is for counts them, took ``took_ns``."""

    took_ns: int
    terms: tuple[float, ...]


class Speed(NamedTuple):
    """A codec: wire to raw bytes, the pace of encoding and decoding raw bytes, what of KV shows by (tokens, 1)."""

    ratio: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float
    exposed: tuple[Seen, ...] = ()


class Measured(NamedTuple):
    """Observations, by what they are of; empty or None where nothing was measured."""

    vllm_prefill: tuple[Seen, ...] = ()
    vllm_step: tuple[Seen, ...] = ()
    worker_prefill: tuple[Seen, ...] = ()
    worker_step: tuple[Seen, ...] = ()
    codecs: Mapping[str, Speed] = {}
    link_bytes_per_s: float | None = None


def read(folder: Path, cluster: Cluster) -> Measured:
    """All that the files in ``folder`` say about ``cluster``; what they do not is None or empty. Raises nothing."""
    found = Measured()
    readers: dict[str, Callable[[Envelope, Cluster, Measured], Measured]] = {
        "prefill": _of_prefill,
        "decode": _of_decode,
        "crossover": _of_crossover,
        "codec": _of_codec,
        "link": _of_link,
    }
    used = []
    if not folder.is_dir():
        log.warning("[proxy] measurements names no folder", folder=str(folder))
        return found
    for measure, reader in readers.items():
        path = folder / f"{measure}.json"
        try:
            found = reader(result_files.read(path, measure), cluster, found)
            used.append(path.name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, msgspec.DecodeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            log.warning("a measurement is left out", file=str(path), reason=reason)
    log.info("estimates start from measurements", folder=str(folder), files=used)
    return _with_exposed(found, cluster)


def _with_exposed(found: Measured, cluster: Cluster) -> Measured:
    """What would show of each codec's transfers beside the measured prefills, where the model's KV has a known size.

    A transfer runs beside its prefill: its last frame shows, and what the prefill is too short to hide.
    """
    token_bytes, rate = kv_bytes_per_token(Path(cluster.pair.hf_dir)), found.link_bytes_per_s
    if not token_bytes or not rate:
        return found._replace(codecs={})
    most = cluster.link.frame_mib << 20

    def exposed(speed: Speed, prefill: Seen) -> Seen:
        raw_bytes = prefill.terms[0] * token_bytes
        rates = speed.encode_bytes_per_s, rate / speed.ratio, speed.decode_bytes_per_s
        last_ns = sum(_ns(min(raw_bytes, most) / each) for each in rates)
        return Seen(last_ns + max(0, _ns(raw_bytes / min(rates)) - prefill.took_ns), prefill.terms)

    codecs = {
        name: speed._replace(exposed=tuple(exposed(speed, prefill) for prefill in found.vllm_prefill))
        for name, speed in found.codecs.items()
    }
    return found._replace(codecs=codecs)


def _of_prefill(envelope: Envelope, cluster: Cluster, found: Measured) -> Measured:
    require_model(DEFAULT_MODEL, cluster)
    require_host(envelope, cluster.prefill.host, gpu=True)
    rates = summary_of(envelope, Rates).tokens_per_s
    seen = tuple(Seen(_ns(int(tokens) / rate[_EXPORT]), (int(tokens), 1)) for tokens, rate in rates.items())
    return found._replace(vllm_prefill=seen)


def _of_decode(envelope: Envelope, cluster: Cluster, found: Measured) -> Measured:
    command = envelope.command
    own = command[command.index("--gguf") + 1 :][:1] if "--gguf" in command else []
    if own and Path(own[0]).name != Path(cluster.pair.gguf).name:
        raise UnfitError(f"it is of {own[0]}, not of {cluster.pair.gguf}")
    if not own:
        require_model(DEFAULT_MODEL, cluster)
    require_host(envelope, cluster.decode.host)
    context = next((each["context_tokens"] for each in envelope.samples if each.get("what") == "memory"), 0)
    rates = summary_of(envelope, Rates).tokens_per_s[_WORKER]
    steps = ((int(sequences), rate) for sequences, rate in rates.items())
    seen = tuple(Seen(_ns(sequences / rate), (1, sequences, sequences * context)) for sequences, rate in steps)
    return found._replace(worker_step=seen)


def _of_crossover(envelope: Envelope, cluster: Cluster, found: Measured) -> Measured:
    """What was measured one engine at a time is better known; of vLLM's steps only this measurement knows."""
    crossover = summary_of(envelope, Crossover)
    require_model(crossover.stack.model, cluster)
    require_host(envelope, cluster.prefill.host, gpu=True)
    require_host(envelope, cluster.decode.host)
    prefill, step = _alone(crossover, "gpu")
    local, local_step = _alone(crossover, "cpu")
    return found._replace(
        vllm_prefill=found.vllm_prefill or tuple(prefill),
        vllm_step=tuple(step),
        worker_prefill=tuple(Seen(each.took_ns, (*each.terms, 0)) for each in local),
        worker_step=found.worker_step or tuple(local_step),
    )


def _alone(crossover: Crossover, option: str) -> tuple[list[Seen], list[Seen]]:
    """First tokens and steps of one request at a time, and the steps of several, without the prefills between them."""
    prefills, steps = [], []
    for each in crossover.workloads.values():
        load, by_requests = each.workload, each.options.get(option, {})
        if load.output_tokens < 2 or "1" not in by_requests:
            continue
        prefill_ns = _ns(by_requests["1"].ttft_s.p50)
        prefills.append(Seen(prefill_ns, (load.prompt_tokens, 1)))
        for requests, times in by_requests.items():
            count = int(requests)
            tpot_ns = _ns(times.tpot_s.p50)
            others_ns = prefill_ns * (count - 1) // (load.output_tokens - 1)
            context = count * (load.prompt_tokens + load.output_tokens // 2)
            steps.append(Seen(max(tpot_ns - others_ns, tpot_ns // 2), (1, count, context)))
    return prefills, steps


def _of_codec(envelope: Envelope, cluster: Cluster, found: Measured) -> Measured:
    for host in (cluster.prefill.host, cluster.decode.host):
        require_host(envelope, host)
    summary = summary_of(envelope, dict[str, msgspec.Raw])
    rows = {name: msgspec.json.decode(summary[name], type=Codec) for name in CODECS if name in summary}
    speeds = {
        name: Speed(
            row.bits_per_element / _RAW_BITS, 1e9 * row.encode_gb_per_s["median"], 1e9 * row.decode_gb_per_s["median"]
        )
        for name, row in rows.items()
    }
    return found._replace(codecs=speeds)


def _of_link(envelope: Envelope, cluster: Cluster, found: Measured) -> Measured:
    """Of loopback where the worker is on this host, else of the path that was measured between two."""
    local = is_local(cluster.decode.host) and is_local(cluster.prefill.host)
    link = summary_of(envelope, Link)
    rates = link.loopback if local else link.path
    if local:
        require_host(envelope, cluster.decode.host)
    if "raw" not in rates:
        raise UnfitError(f"it has no rate of raw over {'loopback' if local else 'a path between two hosts'}")
    return found._replace(link_bytes_per_s=1e9 * rates["raw"].gb_per_s["median"])


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
