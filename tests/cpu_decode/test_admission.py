import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_decode.admission import Admission
from transfer.errors import CapacityError, RequestError


def test_cells_and_ids_come_back():
    admission = Admission(num_cells=100, max_sequences=2)
    first, second = admission.admit(60), admission.admit(40)
    assert {first, second} == {0, 1}
    assert (admission.used_cells, admission.admitted) == (100, 2)
    admission.release(first)
    assert admission.used_cells == 40
    assert admission.admit(60) == first


def test_a_full_worker_says_so_and_a_hopeless_request_is_told_apart():
    admission = Admission(num_cells=100, max_sequences=2)
    admission.admit(60)
    with pytest.raises(CapacityError, match="41 cells, 40 are free"):
        admission.admit(41)
    with pytest.raises(RequestError, match="max_tokens need 101"):
        admission.admit(101)
    admission.admit(1)
    with pytest.raises(CapacityError, match="all 2 sequences"):
        admission.admit(1)
    assert admission.used_cells == 61


def test_shared_cells_are_free_when_their_last_holder_has_gone():
    admission = Admission(num_cells=100, max_sequences=4)
    donor = admission.admit(60)
    sharer = admission.admit(70, donor, 50)
    assert admission.used_cells == 80
    admission.release(donor)
    assert admission.used_cells == 70
    with pytest.raises(CapacityError, match="31 cells, 30 are free"):
        admission.admit(81, sharer, 50)
    admission.release(sharer)
    assert admission.used_cells == 0


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5), st.integers(0, 40), st.booleans()), max_size=60))
def test_promises_are_the_union_of_what_sequences_hold(requests):
    admission = Admission(num_cells=120, max_sequences=6)
    held: dict[int, list[object]] = {}
    for num_tokens, choice, shared_tokens, leaves in requests:
        picked = sorted(held)[choice % len(held)] if held else None
        if leaves and picked is not None:
            admission.release(picked)
            del held[picked]
        else:
            shared_tokens = min(shared_tokens, num_tokens - 1, len(held[picked])) if picked is not None else 0
            shared = held[picked][:shared_tokens] if picked is not None else []
            try:
                seq_id = admission.admit(num_tokens, picked, shared_tokens)
            except CapacityError:
                assert len(held) == 6 or admission.used_cells + num_tokens - shared_tokens > 120
            else:
                held[seq_id] = [*shared, *(object() for _ in range(num_tokens - shared_tokens))]
        assert admission.used_cells == len({cell for cells in held.values() for cell in cells}) <= 120
        assert admission.admitted == len(held)
