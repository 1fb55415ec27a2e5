"""What a result says in a sentence or two, for the top of a report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from measurements import crossover_summary

# By measurement; what names a number that a summary lacks is left out.
_SENTENCES = {
    "codec": (
        "q8: {q8[bits_per_element]:.1f} bits an element, KL to uncompressed KV {q8[kl_mean]:.4f} nats;"
        " rounding to bf16 alone {bf16_rounding[kl_mean]:.4f}, weights at q8_0 {weights_q8_0[kl_mean]:.4f}",
    ),
    "link": (
        "loopback, raw: {loopback_raw_gb_per_s:.2f} GB/s, {loopback_raw_vs_zmq:.2f} of bare ZeroMQ,"
        " {loopback_raw_vs_zmq_copied:.2f} of bare ZeroMQ that copies its data once",
        "10 Gbit/s, raw: {shaped_10g_raw_vs_iperf3:.3f} of iperf3, sealed with AES-GCM"
        " {shaped_10g_aes_gcm_vs_iperf3:.3f}; q8 moves {shaped_10g_q8_vs_raw:.2f} times as much KV",
        "exposed at 4,000 prefilled tokens/s: raw {exposed_raw_fraction:.1%} of the prefill, q8"
        " {exposed_q8_frames:.2f} frames; everything sent afterwards {exposed_serial_fraction:.0%}",
    ),
    "prefill": ("vLLM with export over without: {export_on_vs_off_3500:.3f} at 3,500 tokens",),
    "decode": ("tokens/s over llama-batched-bench {vs_batched_bench:.2f}, over llama-server {vs_llama_server:.2f}",),
    "proxy": (
        "the proxy adds {added_ttft_ms_p50:.1f} ms to the first token (99th percentile {added_ttft_ms_p99:.1f});"
        " throughput over direct {throughput_vs_direct:.3f}; split efficiency {split_efficiency:.3f}",
    ),
    "fidelity": ("KL to fp32: raw {raw[kl_split]:.4f} nats, llama.cpp's own prefill {kl_native:.4f}",),
    "ledger": (
        "{requests} requests: {gained_s:.1f} s gained by splitting, {lost_s:.1f} s lost, by the proxy's estimate",
    ),
}


def sentences(measure: str, summary: dict[str, Any]) -> Iterator[str]:
    """What ``summary`` says; nothing of what it does not have."""
    for text in _SENTENCES.get(measure, ()):
        with suppress(KeyError, TypeError, ValueError):
            yield text.format(**summary)
    with suppress(KeyError, TypeError, AttributeError, ValueError):
        if measure == "crossover":
            yield from crossover_summary.sentences(summary)
            for option, row in summary["validation"]["errors"].items():
                ttft, tokens = row["ttft_error_median"], row["tokens_per_s_error_median"]
                yield f"simulated {option}: off by {ttft:.0%} in TTFT and {tokens:.0%} in tokens/s in the median"
        elif measure == "advise":
            for name, made in summary["workloads"].items():
                yield f"simulated, {name}: {made['verdict']}"
