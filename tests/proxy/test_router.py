"""What may be asked for: routes, contexts, codecs, objectives; and the estimate of a prefill."""

from __future__ import annotations

import pytest

from proxy.costs import cpu_prefill
from proxy.failures import ContextLengthError
from proxy.router import (
    ROUTES,
    Objectives,
    bar,
    choose_codec,
    fit,
    open_routes,
    parse_codec,
    parse_objectives,
    parse_route,
    possible_codecs,
    ways_on,
)
from transfer.codecs import landing_codecs
from transfer.errors import CodecError, LinkError, RequestError
from transfer.messages import Sampling, Status


@pytest.mark.parametrize(
    ("forced", "prefill_up", "decode_up", "routes", "reason"),
    [
        (None, True, True, ROUTES, None),
        (None, True, False, ("gpu",), "decode_down"),
        (None, False, True, ("cpu",), "prefill_down"),
        ("gpu", True, True, ("gpu",), "forced"),
        ("cpu", False, True, ("cpu",), "forced"),
    ],
)
def test_what_is_open(forced, prefill_up, decode_up, routes, reason):
    assert open_routes(forced, prefill_up=prefill_up, decode_up=decode_up) == (routes, reason)


@pytest.mark.parametrize(("failing", "routes"), [("prefill", ("cpu",)), ("decode", ("gpu",))])
def test_a_node_that_fails_is_left_out_where_the_other_serves_alone(failing, routes):
    fails = {f"{failing}_failing": True}
    assert open_routes(None, prefill_up=True, decode_up=True, **fails) == (routes, f"{failing}_failing")
    both = open_routes(None, prefill_up=True, decode_up=True, prefill_failing=True, decode_failing=True)
    assert both.routes == ROUTES


@pytest.mark.parametrize(
    ("forced", "prefill_up", "decode_up", "named"),
    [
        (None, False, False, "prefill"),
        ("split", True, False, "decode"),
        ("split", False, True, "prefill"),
        ("gpu", False, True, "prefill"),
        ("cpu", True, False, "decode"),
    ],
)
def test_what_is_down_is_named(forced, prefill_up, decode_up, named):
    with pytest.raises(LinkError, match=named):
        open_routes(forced, prefill_up=prefill_up, decode_up=decode_up)


def test_parse_route():
    assert parse_route(None) is None
    assert parse_route("auto") is None
    assert parse_route("cpu") == "cpu"
    with pytest.raises(RequestError, match="split, gpu, cpu, auto"):
        parse_route("tpu")


@pytest.mark.parametrize(("prompt", "asked", "given"), [(90, 10, 10), (90, None, 10), (99, None, 1)])
def test_fit(prompt, asked, given):
    assert fit(prompt, asked, 100) == given


@pytest.mark.parametrize(("prompt", "asked"), [(90, 11), (100, None), (100, 1), (5000, None)])
def test_what_does_not_fit(prompt, asked):
    with pytest.raises(ContextLengthError):
        fit(prompt, asked, 100)


def test_cpu_prefill():
    status = Status(
        worker="w",
        used_cells=0,
        num_cells=1,
        running_sequences=0,
        reserved_sequences=0,
        max_sequences=1,
        landing_bytes=0,
        prefill_tokens_per_s=250.0,
        prefill_basis="measured",
    )
    assert cpu_prefill(500, status) == (2_000_000_000, "measured")
    assert cpu_prefill(500, None) is None


def test_a_barred_route_is_not_chosen_and_not_forced():
    typical = bar(Sampling(max_tokens=1, typical_p=0.5), echo=False)
    assert typical == {"gpu": "typical_p"}
    assert open_routes(None, prefill_up=True, decode_up=True, barred=typical).routes == ("split", "cpu")
    assert open_routes(None, prefill_up=False, decode_up=True, barred=typical).routes == ("cpu",)
    with pytest.raises(LinkError, match="typical_p needs the decode node"):
        open_routes(None, prefill_up=True, decode_up=False, barred=typical)
    with pytest.raises(RequestError, match="route gpu cannot serve typical_p") as caught:
        open_routes("gpu", prefill_up=True, decode_up=True, barred=typical)
    assert caught.value.param == "typical_p"


def test_only_vllm_scores_prompts():
    echo = bar(Sampling(max_tokens=1), echo=True)
    assert open_routes(None, prefill_up=True, decode_up=True, barred=echo) == (("gpu",), "only_vllm_can")
    assert open_routes("gpu", prefill_up=True, decode_up=False, barred=echo) == (("gpu",), "forced")
    for route in ("split", "cpu"):
        with pytest.raises(RequestError, match="use gpu"):
            open_routes(route, prefill_up=True, decode_up=True, barred=echo)
    assert not bar(Sampling(max_tokens=1, json_schema="{}"), echo=False)


@pytest.mark.parametrize(
    ("cells", "chosen"), [("f16", "raw"), ("bf16", "raw"), ("q8_0", "rows_q8_0"), ("q4_0", "rows_q4_0")]
)
def test_without_a_wish_kv_travels_as_the_cells_hold_it(cells, chosen):
    possible = landing_codecs(cells)
    assert choose_codec(None, "auto", possible) == chosen
    # A client may undo what the file says.
    assert choose_codec("auto", possible[-1], possible) == chosen


def test_the_client_is_asked_before_the_file():
    assert choose_codec("q8", "lz4", ("raw", "lz4", "q8")) == "q8"
    assert choose_codec(None, "lz4", ("raw", "lz4", "q8")) == "lz4"


def test_a_codec_that_cannot_land_is_refused_with_those_that_can():
    with pytest.raises(RequestError, match="rows_q8_0, auto") as caught:
        choose_codec("lz4", "auto", ("rows_q8_0",))
    assert caught.value.param == "X-Isthmus-Codec"
    with pytest.raises(CodecError, match=r"\[link\] codec: lz4 .* use one of rows_q8_0"):
        choose_codec(None, "lz4", ("rows_q8_0",))
    with pytest.raises(CodecError, match="no codec"):
        choose_codec(None, "auto", ())


def test_parse_codec():
    assert [parse_codec(header) for header in (None, "auto", "zstd")] == [None, "auto", "zstd"]
    with pytest.raises(RequestError, match="kvz3"):
        parse_codec("mp3")


def test_which_codecs_may_be_used():
    can = ("raw", "lz4", "q8", "zstd")
    assert possible_codecs(None, "auto", can, {}) == ("raw", "lz4", "zstd")
    assert possible_codecs(None, "auto", can, {"raw": "wrong", "zstd": "wrong"}) == ("lz4",)
    assert possible_codecs(None, "zstd", can, {}) == ("zstd",)
    assert possible_codecs("q8", "zstd", can, {}) == ("q8",)
    assert possible_codecs(None, "auto", ("rows_q8_0",), {}) == ("rows_q8_0",)


def test_objectives_are_milliseconds():
    assert parse_objectives({}) == Objectives(None, None)
    assert parse_objectives({"X-SLO-TTFT-Ms": "250", "X-SLO-TPOT-Ms": "0.5"}) == (250_000_000, 500_000)


@pytest.mark.parametrize("name", ["X-SLO-TTFT-Ms", "X-SLO-TPOT-Ms"])
@pytest.mark.parametrize("value", ["", "fast", "0", "-1", "nan", "inf", "1e12"])
def test_what_is_no_objective_is_refused_by_name(name, value):
    with pytest.raises(RequestError, match=name) as caught:
        parse_objectives({name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("changes", "ways"),
    [
        ({}, ROUTES),
        ({"prefill_up": False}, ("cpu",)),
        ({"another_worker_up": False}, ("gpu",)),
        # The worker that has failed is asked again where nothing else is left.
        ({"prefill_up": False, "another_worker_up": False}, ("cpu",)),
        ({"prefill_up": False, "another_worker_up": False, "some_worker_up": False}, ()),
        ({"another_worker_up": False, "barred": {"gpu": "typical_p"}}, ("cpu",)),
        ({"forced": "split"}, ("split",)),
        ({"forced": "split", "another_worker_up": False}, ()),
    ],
)
def test_ways_on(changes, ways):
    facts = {"prefill_up": True, "another_worker_up": True, "some_worker_up": True, "barred": {}, "forced": None}
    facts |= changes
    assert ways_on(facts.pop("forced"), **facts) == ways
