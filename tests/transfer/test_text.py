from hypothesis import given
from hypothesis import strategies as st

from transfer.text import TextStream


def feed(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(stop)
    return [stream.push(piece) for piece in pieces], stream


def test_characters_split_over_tokens_come_out_whole():
    given_out, stream = feed([b"caf", b"\xc3", b"\xa9 ", b"\xf0\x9f", b"\x8c\x8a!"])
    assert given_out == ["caf", "", "é ", "", "🌊!"]
    assert stream.flush() == ""


def test_bytes_that_complete_nothing_become_one_replacement_at_the_end():
    given_out, stream = feed([b"a", b"\xf0\x9f"])
    assert given_out == ["a", ""]
    assert stream.flush() == "�"


def test_a_stop_string_over_token_boundaries_is_not_given_out():
    given_out, stream = feed([b"one ", b"tw", b"o th", b"ree"], stop=("two three",))
    assert "".join(given_out) == "one "
    assert stream.stopped


def test_text_that_only_looked_like_a_stop_string_comes_out():
    given_out, stream = feed([b"EN", b"D", b"ING"], stop=("END.",))
    assert "".join(given_out) + stream.flush() == "ENDING"
    assert not stream.stopped


def test_the_earliest_of_several_stop_strings_wins():
    given_out, stream = feed([b"a b c d"], stop=("c", "b"))
    assert given_out == ["a "]
    assert stream.stopped


@given(st.text(max_size=60), st.lists(st.integers(1, 4)), st.sampled_from([(), ("ab",), ("aab", "b\n")]))
def test_any_split_gives_the_text_up_to_the_first_stop(text: str, sizes: list[int], stop: tuple[str, ...]):
    data, pieces = text.encode(), []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    given_out, stream = feed([*pieces, data], stop)
    whole = "".join(given_out) if stream.stopped else "".join(given_out) + stream.flush()
    cuts = [at for s in stop if (at := text.find(s)) >= 0]
    # With several stops the first to be completed wins, which may lie behind one that begins earlier.
    assert whole in {text[:at] for at in cuts} if cuts else whole == text


def test_a_stop_string_that_comes_too_early_is_text():
    stream = TextStream(("END",))
    assert stream.push(b"END of EN", may_stop=False) == "END of "
    assert stream.push(b"D.") == ""
    assert stream.stopped


def test_a_stop_string_that_came_too_early_stays_text_while_it_could_grow_into_another():
    stream = TextStream(("a", "aa"))
    assert [stream.push(b"a", may_stop=False), stream.push(b"a", may_stop=False)] == ["", "a"]
    assert stream.flush() == "a"
    assert not stream.stopped
    stream = TextStream(("a", "ab"))
    assert stream.push(b"a", may_stop=False) == ""
    assert stream.push(b"c a") == "ac "
    assert stream.stopped
