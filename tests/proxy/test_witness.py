from __future__ import annotations

from proxy.witness import TOP, Evidence, Witness
from transfer.messages import Sampling, TokenLogprob

TWENTY = tuple((token, -1.0 - token) for token in range(TOP))


def said(token: int = 5) -> TokenLogprob:
    return TokenLogprob(token, -6.0, TWENTY)


def test_nobody_looks_and_nothing_changes():
    witness = Witness()
    sampling = Sampling(max_tokens=3, logprobs=2)
    assert witness.ask(sampling, "w", "q8") is sampling
    witness.transplanted([1, 2], 3)
    assert witness.take([said()]) == (said(),)
    assert witness.evidence is None


def test_the_first_token_on_transplanted_kv_is_kept_and_the_client_sees_what_it_asked_for():
    for asked, seen in ((None, ()), (0, ()), (2, TWENTY[:2])):
        witness = Witness(lambda worker, codec: (worker, codec) == ("w", "q8"))
        assert witness.ask(Sampling(max_tokens=3, logprobs=asked), "w", "q8").logprobs == TOP
        witness.transplanted([1, 2], 3)
        got = witness.take([said(5), said(6)])
        assert got == (() if asked is None else (TokenLogprob(5, -6.0, seen), TokenLogprob(6, -6.0, seen)))
        assert witness.evidence == Evidence("w", "q8", [1, 2, 3], TWENTY)
        witness.take([TokenLogprob(7, -1.0, ((7, -1.0),))])
        assert witness.evidence.top == TWENTY


def test_without_a_first_token_the_prompt_is_all():
    witness = Witness(lambda *_: True)
    witness.ask(Sampling(max_tokens=3), "w", "raw")
    witness.transplanted([1, 2], None)
    witness.take([said()])
    assert witness.evidence == Evidence("w", "raw", [1, 2], TWENTY)


def test_what_the_worker_computes_itself_is_no_evidence():
    witness = Witness(lambda *_: True)
    witness.ask(Sampling(max_tokens=3), "w", "raw")
    assert witness.take([said()]) == ()
    assert witness.evidence is None


def test_another_worker_is_another_matter():
    asked: list[str] = []

    def wants(worker: str, _codec: str) -> bool:
        asked.append(worker)
        return worker == "v"

    witness = Witness(wants)
    for _ in range(3):
        # A worker that is full is asked again.
        witness.ask(Sampling(max_tokens=3), "w", "raw")
    witness.transplanted([1], None)
    assert witness.ask(Sampling(max_tokens=3), "v", "raw").logprobs == TOP
    witness.take([said()])
    assert witness.evidence is None
    assert witness.ask(Sampling(max_tokens=3), "v", None).logprobs is None
    assert asked == ["w", "v"]
