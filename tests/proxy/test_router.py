"""Pure decisions: the route, the context, the estimate."""

from __future__ import annotations

import pytest

from proxy.costs import cpu_prefill
from proxy.failures import ContextLengthError
from proxy.router import bar, choose, choose_codec, fit, parse_codec, parse_route
from transfer.codecs import landing_codecs
from transfer.errors import CodecError, LinkError, RequestError
from transfer.messages import Sampling, Status


@pytest.mark.parametrize(
    ("forced", "prefill_up", "decode_up", "route", "reason"),
    [
        (None, True, True, "split", "both_up"),
        (None, True, False, "gpu", "decode_down"),
        (None, False, True, "cpu", "prefill_down"),
        ("gpu", True, True, "gpu", "forced"),
        ("cpu", False, True, "cpu", "forced"),
    ],
)
def test_choose(forced, prefill_up, decode_up, route, reason):
    assert choose(forced, prefill_up=prefill_up, decode_up=decode_up) == (route, reason)


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
        choose(forced, prefill_up=prefill_up, decode_up=decode_up)


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
    assert choose(None, prefill_up=True, decode_up=True, barred=typical).route == "split"
    assert choose(None, prefill_up=False, decode_up=True, barred=typical).route == "cpu"
    with pytest.raises(LinkError, match="typical_p needs the decode node"):
        choose(None, prefill_up=True, decode_up=False, barred=typical)
    with pytest.raises(RequestError, match="route gpu cannot serve typical_p") as caught:
        choose("gpu", prefill_up=True, decode_up=True, barred=typical)
    assert caught.value.param == "typical_p"


def test_only_vllm_scores_prompts():
    echo = bar(Sampling(max_tokens=1), echo=True)
    assert choose(None, prefill_up=True, decode_up=True, barred=echo) == ("gpu", "only_vllm_can")
    assert choose("gpu", prefill_up=True, decode_up=False, barred=echo) == ("gpu", "forced")
    for route in ("split", "cpu"):
        with pytest.raises(RequestError, match="use gpu"):
            choose(route, prefill_up=True, decode_up=True, barred=echo)
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
