"""Numbers from samples that were made up."""

import pytest

from measurements.link_summary import CHECKED, IPERF3, MEMCPY, ZMQ, ZMQ_COPIED, ZMQ_KEPT, summarize, tables


def sample(part, way, turn, seconds, **fields):
    return {"part": part, "way": way, "round": turn, "kv_bytes": 1_000_000_000, "seconds": seconds, **fields}


def test_ratios_are_taken_within_a_round():
    seconds = {1: 0.5, 2: 0.125, 3: 0.25}
    slower = {MEMCPY: 1, ZMQ: 1, ZMQ_COPIED: 1.25, ZMQ_KEPT: 0.5, "raw": 2}
    samples = [
        sample("loopback", way, turn, spent * factor)
        for way, factor in slower.items()
        for turn, spent in seconds.items()
    ]
    summary = summarize(samples, "path")
    assert summary["loopback_raw_gb_per_s"] == 2.0
    assert summary["loopback_raw_vs_zmq"] == 0.5
    assert summary["loopback_raw_vs_zmq_copied"] == 0.625
    assert summary["loopback_raw_vs_zmq_heap_kept"] == 0.25
    assert summary["loopback"][ZMQ]["gb_per_s"] == {"median": 4.0, "quartile_1": 3.0, "quartile_3": 6.0}


def test_what_processors_allow_beside_bare_zeromq():
    spent = {ZMQ: 0.3, ZMQ_COPIED: 0.3, ZMQ_KEPT: 0.3, "raw": 0.5, CHECKED: 0.1}
    samples = [sample("loopback", way, 1, 1.0, sender_cpu_s=s, receiver_cpu_s=s) for way, s in spent.items()]
    samples.append(sample("loopback", MEMCPY, 1, 1.0))
    assert summarize(samples, "path")["loopback_raw_vs_zmq_bound"] == pytest.approx(0.75)


def test_a_path_has_goodput_and_cpu_time():
    cpu = {"sender_cpu_s": 0.25, "receiver_cpu_s": 0.5}
    seconds = {IPERF3: 1.0, ZMQ: 1.0, ZMQ_COPIED: 1.0, "raw": 1.25, "raw integrity": 2, "raw aes-gcm": 4, "q8": 0.625}
    summary = summarize([sample("path", way, 1, spent, **cpu) for way, spent in seconds.items()], "shaped_10g")
    assert summary["shaped_10g_raw_vs_iperf3"] == 0.8
    assert summary["shaped_10g_aes_gcm_vs_iperf3"] == 0.25
    assert summary["shaped_10g_integrity_vs_iperf3"] == 0.5
    assert summary["shaped_10g_q8_vs_raw"] == 2.0
    assert summary["cpu_s_per_gb"]["raw"] == {"sender": 0.25, "receiver": 0.5}


def test_a_path_without_iperf3_has_no_such_ratio():
    ways = (ZMQ, ZMQ_COPIED, "raw", "raw integrity", "raw aes-gcm", "q8")
    summary = summarize([sample("path", way, 1, 1.0, sender_cpu_s=1, receiver_cpu_s=1) for way in ways], "path")
    assert not [key for key in summary if "iperf3" in key]


def test_exposed_time_is_a_part_of_the_prefill_and_so_many_frames():
    spent = {"raw": 0.06, "q8": 0.012, "q8 late": 0.018, "raw aes-gcm": 0.08, "raw serial": 0.86}
    samples = [
        sample("exposed", way, turn, seconds, prefill_s=2.0, fraction=seconds / 2.0)
        for way, seconds in spent.items()
        for turn in (1, 2)
    ]
    samples += [sample("frame", way, turn, 0.006) for way in ("raw", "q8") for turn in (1, 2)]
    summary = summarize(samples, "path")
    assert summary["exposed_raw_fraction"] == pytest.approx(0.03)
    assert summary["exposed_q8_fraction"] == pytest.approx(0.006)
    assert summary["exposed_serial_fraction"] == pytest.approx(0.43)
    assert summary["exposed_raw_aes_gcm_fraction"] == pytest.approx(0.04)
    assert summary["exposed_q8_frames"] == pytest.approx(2.0)
    assert summary["exposed_q8_late_frames"] == pytest.approx(3.0)


def test_the_worst_memory_counts():
    memory = [sample("memory", "raw", turn, 1.0, landing_bytes=turn, grown_bytes=10 * turn) for turn in (1, 3, 2)]
    summary = summarize(memory, "path")
    assert (summary["peak_landing_bytes"], summary["peak_grown_bytes"]) == (3, 30)


def test_injection_by_round_and_its_longest_stalls():
    samples = []
    for turn, factor in ((1, 1.0), (2, 2.0)):
        samples += [sample("inject", "inject", turn, 0.2 * factor), sample("inject", MEMCPY, turn, 0.1 * factor)]
        samples += [sample("inject", "stall", turn, 0.002, chunk_tokens=96)] * 99
    samples.append(sample("inject", "stall", 2, 0.1, chunk_tokens=96))
    summary = summarize(samples, "path")
    assert summary["inject_vs_memcpy"] == pytest.approx(0.5)
    assert summary["inject_stall_ms"] == pytest.approx(2.0)
    assert 2.0 <= summary["inject_stall_p99_ms"] < 100
    assert summary["inject_chunk_tokens"] == 96
    assert tables(summary)
