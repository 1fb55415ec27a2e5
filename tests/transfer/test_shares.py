import pytest

from tests.transfer.kv_plane import GEOMETRY
from transfer.errors import GeometryError
from transfer.shares import Share, require_within, whole


def share(heads=(0, 2), layers=(0, 3)):
    return Share(first_kv_head=heads[0], num_kv_heads=heads[1], first_layer=layers[0], num_layers=layers[1])


def test_the_whole_is_a_share_that_holds_everything():
    everything = whole(GEOMETRY)
    assert everything == share()
    assert everything.size == 6
    assert everything.geometry(GEOMETRY) == GEOMETRY
    require_within(everything, GEOMETRY)


def test_a_share_has_a_geometry_of_its_own():
    own = share((1, 1), (1, 2)).geometry(GEOMETRY)
    assert (own.num_kv_heads, own.num_layers) == (1, 2)
    assert own.head_dim_k == GEOMETRY.head_dim_k


@pytest.mark.parametrize(
    ("left", "right", "meet"),
    [
        (share((0, 1)), share((1, 1)), False),
        (share((0, 1), (0, 2)), share((0, 1), (2, 1)), False),
        (share((0, 2), (0, 1)), share((1, 1), (1, 2)), False),
        (share((0, 2), (0, 2)), share((1, 1), (1, 2)), True),
        (share((0, 1)), share((0, 1)), True),
    ],
)
def test_shares_overlap_where_a_head_of_a_layer_is_in_both(left, right, meet):
    assert left.overlaps(right) is right.overlaps(left) is meet


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (share((0, 3)), "kv_heads"),
        (share((2, 1)), "kv_heads"),
        (share((-1, 2)), "kv_heads"),
        (share((0, 0)), "kv_heads"),
        (share((0, -1)), "kv_heads"),
        (share((0, 2), (1, 3)), "layers"),
        (share((0, 2), (1 << 63, 1 << 63)), "layers"),
    ],
)
def test_a_share_that_is_no_part_of_the_model_is_refused_by_name(wrong, field):
    with pytest.raises(GeometryError, match=field):
        require_within(wrong, GEOMETRY)
