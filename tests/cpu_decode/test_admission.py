import pytest

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
