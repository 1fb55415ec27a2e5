"""The simulation against what can be worked out by hand, and rules that hold whatever the numbers are."""

from __future__ import annotations

from collections.abc import Generator

import msgspec
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from measurements.profiles import CodecCost, Device, LinkSpeed, ModelShape, Setup
from measurements.roofline import (
    Chunk,
    flops,
    kv_bytes_per_token,
    kv_capacity_tokens,
    step_seconds,
    weight_bytes,
    wire_seconds,
)
from measurements.simulate import ARCHITECTURES, ROUNDS, Architecture, Cluster, Run, simulate
from measurements.simulate_engine import Cores, Engine, NoRoomError
from measurements.workloads import WORKLOADS, Workload, asks

# 1 MB of weights, 64 bytes of KV a token.
MODEL = ModelShape(
    name="tiny",
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    layer_params=900_000,
    output_params=100_000,
    gpu_bits_per_weight=8.0,
    cpu_bits_per_weight=8.0,
)
RAW = CodecCost(name="raw", bits_per_element=16.0, encode_gb_per_s=1000.0, decode_gb_per_s=1000.0)
SMALL = CodecCost(name="small", bits_per_element=4.0, encode_gb_per_s=1000.0, decode_gb_per_s=1000.0)


def device(engine: str, **changes: object) -> Device:
    made = Device(
        name=engine,
        engine=engine,
        compute_tflops=1.0,
        compute_efficiency=1.0,
        memory_gb_per_s=1.0,
        memory_efficiency=1.0,
        memory_gib=0.01,
        step_overhead_ms=0.0,
        step_tokens=512,
        max_sequences=64,
        inject_gb_per_s=1000.0,
    )
    return msgspec.structs.replace(made, **changes)


SETUP = Setup(
    gpu=device("vllm"),
    cpu=device("llama.cpp"),
    link=LinkSpeed(name="l", gbit_per_s=1000.0, efficiency=1.0, handoff_ms=0.0),
    model=MODEL,
    codecs=(RAW, SMALL),
)
ONE = Workload("one", 400, 11, ttft_slo_s=1, tpot_slo_s=1, spread=0)


def room_gib(tokens: int) -> float:
    """Memory for the weights and KV of ``tokens``."""
    return (1e6 + (tokens + 0.5) * kv_bytes_per_token(MODEL)) / 2**30


def run(setup: Setup, architecture: Architecture, workload: Workload = ONE, concurrency: int = 1) -> Run:
    done = simulate(setup, architecture, setup.codecs[0], workload, concurrency)
    assert done is not None
    return done


def test_kv_of_llama_is_128_kib_a_token() -> None:
    llama = msgspec.structs.replace(MODEL, num_layers=32, num_kv_heads=8, head_dim=128)
    assert kv_bytes_per_token(llama) == 128 * 1024


def test_a_step_that_decodes_reads_weights_and_kv() -> None:
    assert weight_bytes(MODEL, "vllm") == 1e6
    assert step_seconds(SETUP.gpu, MODEL, [100, 50], []) == pytest.approx((1e6 + 150 * kv_bytes_per_token(MODEL)) / 1e9)
    slower = device("vllm", memory_efficiency=0.5, step_overhead_ms=3.0)
    assert step_seconds(slower, MODEL, [], []) == pytest.approx(0.002 + 0.003)


def test_a_step_that_prefills_computes() -> None:
    weak = device("vllm", compute_tflops=1e-3)
    work = [Chunk(0, 100)]
    assert step_seconds(weak, MODEL, [], work) == pytest.approx(flops(MODEL, [], work) / 1e9)


def test_attention_looks_at_every_position_before() -> None:
    by_hand = sum(4 * 2 * 2 * 8 * (position + 1) for position in range(30, 50))
    dense = 2 * MODEL.layer_params * 20 + 2 * MODEL.output_params
    assert flops(MODEL, [], [Chunk(30, 20)]) == pytest.approx(dense + by_hand)


def test_prefill_in_pieces_costs_what_it_costs_at_once() -> None:
    whole = flops(MODEL, [], [Chunk(0, 300)])
    pieces = [Chunk(0, 100), Chunk(100, 150), Chunk(250, 50)]
    assert flops(MODEL, [], pieces) - 4 * MODEL.output_params == pytest.approx(whole)


def test_the_slowest_of_codec_and_wire_decides() -> None:
    link = LinkSpeed(name="l", gbit_per_s=8.0, efficiency=0.5, handoff_ms=0.0)
    raw_gb = 1000 * kv_bytes_per_token(MODEL) / 1e9
    assert wire_seconds(link, RAW, MODEL, 1000) == pytest.approx(raw_gb / 0.5)
    assert wire_seconds(link, SMALL, MODEL, 1000) == pytest.approx(raw_gb / 2)
    slow = msgspec.structs.replace(SMALL, decode_gb_per_s=0.25)
    assert wire_seconds(link, slow, MODEL, 1000) == pytest.approx(raw_gb / 0.25)


def test_room_for_kv_is_what_the_weights_leave() -> None:
    room = 0.01 * 2**30 - 1e6
    assert kv_capacity_tokens(SETUP.gpu, MODEL) == int(room / kv_bytes_per_token(MODEL))
    assert kv_capacity_tokens(device("vllm", memory_gib=0.0001), MODEL) == 0


@pytest.mark.parametrize(("shared", "handed_over_s", "stepped_s"), [(False, 0.5, 1.0), (True, 1.0, 1.5)])
def test_a_handoff_is_work_for_cores_that_engines_share(shared: bool, handed_over_s: float, stepped_s: float) -> None:
    env = simpy.Environment()
    cluster = Cluster(env, msgspec.structs.replace(SETUP, shared_cores=shared), RAW)
    ended: dict[str, float] = {}

    def until(what: str, work: Generator[simpy.Event]) -> Generator[simpy.Event]:
        yield from work
        ended[what] = env.now

    env.process(until("handoff", cluster._hand_over(0.5)))
    env.process(until("step", cluster.cpus[0]._cores.compute(1.0)))
    env.run()
    assert ended == {"handoff": pytest.approx(handed_over_s), "step": pytest.approx(stepped_s)}


def test_one_request_takes_its_prefill_and_its_steps() -> None:
    for architecture, node in (("gpu", SETUP.gpu), ("cpu", SETUP.cpu)):
        answer = run(SETUP, architecture).answers[0]
        prefill_s = step_seconds(node, MODEL, [], [Chunk(0, 400)])
        decode_s = sum(step_seconds(node, MODEL, [held], []) for held in range(400, 410))
        assert answer.ttft_s == pytest.approx(prefill_s)
        assert answer.e2e_s == pytest.approx(prefill_s + decode_s)
        assert answer.tpot_s == pytest.approx(decode_s / 10)


def test_a_batch_reads_the_weights_once() -> None:
    together = ONE._replace(together=True)
    alone_s, eight_s = (run(SETUP, "gpu", together, n).answers[0].tpot_s for n in (1, 8))
    assert alone_s < eight_s < 2 * alone_s


def test_split_takes_the_one_nodes_prefill_and_the_others_steps() -> None:
    setup = msgspec.structs.replace(SETUP, cpu=device("llama.cpp", compute_tflops=1e-2, memory_gb_per_s=4.0))
    split, gpu, cpu = (run(setup, each).answers[0] for each in ("split", "gpu", "cpu"))
    assert split.ttft_s == pytest.approx(gpu.ttft_s)
    assert split.tpot_s == pytest.approx(cpu.tpot_s, rel=0.01)
    assert split.e2e_s < min(gpu.e2e_s, cpu.e2e_s)


def test_a_link_that_keeps_up_with_prefill_costs_a_layer_and_no_more() -> None:
    setup = msgspec.structs.replace(SETUP, gpu=device("vllm", compute_tflops=1e-3))
    prefill_s = run(setup, "gpu").answers[0].ttft_s
    fast = msgspec.structs.replace(setup.link, gbit_per_s=400 * kv_bytes_per_token(MODEL) * 8 / (prefill_s / 2) / 1e9)
    transfer_s = wire_seconds(fast, RAW, MODEL, 400)
    assert transfer_s == pytest.approx(prefill_s / 2)
    at_once = run(setup, "split").answers[0]
    behind = run(msgspec.structs.replace(setup, link=fast), "split").answers[0]
    exposed_s = behind.e2e_s - at_once.e2e_s
    assert exposed_s == pytest.approx(transfer_s / MODEL.num_layers, rel=0.01)


def test_the_first_token_does_not_wait_for_the_link_and_a_codec_shortens_the_rest() -> None:
    slow = msgspec.structs.replace(SETUP, link=msgspec.structs.replace(SETUP.link, gbit_per_s=0.001))
    raw = run(slow, "split").answers[0]
    small = run(msgspec.structs.replace(slow, codecs=(SMALL,)), "split").answers[0]
    assert raw.ttft_s == small.ttft_s == run(SETUP, "split").answers[0].ttft_s
    assert raw.e2e_s - raw.ttft_s > 3.5 * (small.e2e_s - small.ttft_s)


def test_replicas_take_turns() -> None:
    slow = msgspec.structs.replace(SETUP, cpu=device("llama.cpp", memory_gb_per_s=0.01))
    tpots = [answer.tpot_s for answer in run(slow, "replicated").answers]
    assert tpots[0] == pytest.approx(tpots[2])
    assert tpots[1] > 50 * tpots[0]


def test_a_worker_without_room_makes_requests_wait() -> None:
    full = msgspec.structs.replace(SETUP, cpu=device("llama.cpp", memory_gib=room_gib(411)))
    together = ONE._replace(together=True)
    ends = sorted(answer.e2e_s for answer in run(full, "cpu", together, 3).answers)
    assert ends[-1] == pytest.approx(3 * ends[0], rel=0.01)


def test_vllm_preempts_the_youngest_and_loses_no_token() -> None:
    full = msgspec.structs.replace(SETUP, gpu=device("vllm", memory_gib=room_gib(2 * 405)))
    done = run(full, "gpu", ONE._replace(together=True), 2)
    assert done.preemptions > 0
    assert [answer.output_tokens for answer in done.answers] == [11] * 2 * ROUNDS
    roomy = run(SETUP, "gpu", ONE._replace(together=True), 2)
    assert max(a.e2e_s for a in done.answers) > max(a.e2e_s for a in roomy.answers)


def test_long_prompts_hold_up_others_tokens_on_the_gpu_and_not_where_they_only_decode() -> None:
    busy = msgspec.structs.replace(SETUP, gpu=device("vllm", compute_tflops=1e-3))
    mixed = Workload("mixed", 400, 40, ttft_slo_s=1, tpot_slo_s=1)
    gpu, split = (max(a.tpot_s for a in run(busy, each, mixed, 8).answers) for each in ("gpu", "split"))
    assert gpu > 3 * split


def test_a_shared_prefix_is_computed_and_sent_once() -> None:
    setup = msgspec.structs.replace(
        SETUP,
        gpu=device("vllm", compute_tflops=1e-3),
        link=msgspec.structs.replace(SETUP.link, gbit_per_s=0.001),
    )
    shared = ONE._replace(shared_tokens=360)
    for architecture in ("gpu", "split"):
        first, second, _ = run(setup, architecture, shared).answers
        assert second.ttft_s < 0.2 * first.ttft_s
        assert second.e2e_s < 0.2 * first.e2e_s


def test_of_a_shared_prefix_whole_blocks_are_lent() -> None:
    setup = msgspec.structs.replace(SETUP, gpu=device("vllm", compute_tflops=1e-3, block_tokens=256))
    first, second, _ = run(setup, "gpu", ONE._replace(shared_tokens=360)).answers
    left_s = step_seconds(setup.gpu, MODEL, [], [Chunk(256, 144)])
    assert second.ttft_s == pytest.approx(left_s)
    assert left_s > 0.3 * first.ttft_s


def test_a_worker_promises_when_it_is_asked_and_vllm_when_a_step_begins() -> None:
    """So the second of two that come together borrows nothing of the worker, and of vLLM if the first has been done."""
    slow = {"compute_tflops": 1e-3, "max_sequences": 1}
    setup = msgspec.structs.replace(SETUP, gpu=device("vllm", **slow), cpu=device("llama.cpp", compute_tflops=1e-3))
    shared = ONE._replace(shared_tokens=384, together=True)
    gpu, cpu = (sorted(a.ttft_s for a in run(setup, each, shared, 2).answers[::ROUNDS]) for each in ("gpu", "cpu"))
    alone_s = run(setup, "gpu").answers[0].ttft_s
    assert gpu[1] < 1.2 * alone_s
    assert cpu[1] > 1.7 * alone_s


def test_requests_that_come_together_do_not_reach_the_engine_together() -> None:
    slow = msgspec.structs.replace(SETUP, gpu=device("vllm", compute_tflops=1e-3, step_tokens=2048), arrival_ms=1.0)
    ttfts = [each.ttft_s for each in run(slow, "gpu", ONE._replace(together=True), 3).answers[::ROUNDS]]
    step_s = step_seconds(slow.gpu, MODEL, [], [Chunk(0, 400)])
    assert ttfts[0] == pytest.approx(0.001 + step_s)
    assert ttfts[1] == pytest.approx(ttfts[2], rel=0.01)
    assert ttfts[1] > 2 * step_s


def test_prompts_beside_a_workers_sequences_cost_what_those_cost() -> None:
    worker = device("llama.cpp", sequence_ms=2.0)
    alone_s = step_seconds(worker, MODEL, [50], [])
    assert step_seconds(worker, MODEL, [50], [Chunk(0, 8)]) - alone_s == pytest.approx(0.016, rel=0.01)
    assert step_seconds(worker, MODEL, [], [Chunk(0, 8)]) < alone_s


def test_a_model_without_room_is_no_result() -> None:
    small = msgspec.structs.replace(SETUP, gpu=device("vllm", memory_gib=room_gib(300)))
    assert simulate(small, "gpu", RAW, ONE, 1) is None
    assert simulate(small, "split", RAW, ONE, 1) is None
    assert simulate(small, "cpu", RAW, ONE, 1) is not None
    with pytest.raises(NoRoomError):
        env = simpy.Environment()
        Engine(env, small.gpu, MODEL, Cores(env)).submit(301, 1)


def test_engines_that_compute_at_once_share_the_cores() -> None:
    env = simpy.Environment()
    cores = Cores(env)
    ended = {}

    def work(name: str, begin_s: float, seconds: float) -> Generator[simpy.Event, None, None]:
        yield env.timeout(begin_s)
        yield from cores.compute(seconds)
        ended[name] = env.now

    for name, begin_s, seconds in (("long", 0, 3), ("short", 1, 1), ("alone", 10, 2)):
        env.process(work(name, begin_s, seconds))
    env.run()
    # From 1 s on each gets half: the short one is done at 3 s, when the long one has 1 s left.
    assert ended == {"short": pytest.approx(3), "long": pytest.approx(4), "alone": pytest.approx(12)}


def test_replicas_on_the_same_cores_are_no_faster_than_one() -> None:
    many = ONE._replace(together=True)
    apart, shared = (
        sum(a.e2e_s for a in run(msgspec.structs.replace(SETUP, shared_cores=each), "replicated", many, 8).answers)
        for each in (False, True)
    )
    assert shared > 1.5 * apart


def test_what_every_request_and_every_sequence_costs() -> None:
    slower = msgspec.structs.replace(SETUP, gpu=device("vllm", request_ms=20.0, sequence_ms=2.0))
    before, after = (run(setup, "gpu").answers[0] for setup in (SETUP, slower))
    assert after.ttft_s - before.ttft_s == pytest.approx(0.020)
    assert after.tpot_s - before.tpot_s == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("changes", "best"),
    [
        ({"cpu": device("llama.cpp", compute_tflops=1e-3, memory_gb_per_s=0.05)}, "gpu"),
        ({"gpu": device("vllm", compute_tflops=1e-3, memory_gb_per_s=0.05)}, "cpu"),
        ({"gpu": device("vllm", memory_gb_per_s=0.05), "cpu": device("llama.cpp", compute_tflops=1e-3)}, "split"),
    ],
)
def test_the_router_takes_what_is_cheapest(changes: dict[str, Device], best: Architecture) -> None:
    setup = msgspec.structs.replace(SETUP, **changes)
    assert run(setup, "auto").answers == run(setup, best).answers


def test_a_workload_is_the_same_every_time() -> None:
    for workload in WORKLOADS:
        first = list(asks(workload, 3, 20))
        assert first == list(asks(workload, 3, 20))
        assert first != list(asks(workload, 4, 20))
        own = workload.prompt_tokens - workload.shared_tokens
        assert all(0.74 * own < ask.prompt_tokens - workload.shared_tokens < 1.26 * own for ask in first)


@settings(max_examples=40, deadline=None)
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    concurrency=st.integers(1, 6),
    prompt=st.integers(20, 600),
    output=st.integers(4, 60),
    shared=st.floats(0, 0.9),
    room_tokens=st.integers(900, 3000),
    together=st.booleans(),
)
def test_every_request_is_answered_whatever_the_room(
    architecture: Architecture,
    concurrency: int,
    prompt: int,
    output: int,
    shared: float,
    room_tokens: int,
    together: bool,
) -> None:
    setup = msgspec.structs.replace(
        SETUP,
        gpu=device("vllm", memory_gib=room_gib(room_tokens)),
        cpu=device("llama.cpp", memory_gib=room_gib(room_tokens), nodes=2, max_sequences=3),
    )
    workload = Workload("w", prompt, output, 1, 1, shared_tokens=int(prompt * shared), together=together)
    done = run(setup, architecture, workload, concurrency)
    assert len(done.answers) == concurrency * ROUNDS
    assert all(0 < answer.ttft_s <= answer.e2e_s for answer in done.answers)
    assert all(answer.tpot_s > 0 for answer in done.answers)
