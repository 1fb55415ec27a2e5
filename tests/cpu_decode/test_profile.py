from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cpu_decode import profile
from cpu_decode.profile import Profile, Tuned
from transfer.config import Decode
from transfer.errors import ConfigError

TUNED = Tuned(threads=2, batch_threads=4, spin_count=7, huge_pages=False, mmap=False)


def test_a_profile_takes_the_place_of_settings(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    profile.write(
        file, Profile(decode=TUNED, row_ns={1: 10.0, 8: 30.5}, gguf="m.gguf", host={}, seen={"threads 2": 1.0})
    )
    applied = profile.apply(Decode(profile=str(file), num_cells=99))
    assert (applied.threads, applied.batch_threads, applied.spin_count) == (2, 4, 7)
    assert (applied.huge_pages, applied.mmap, applied.num_cells) == (False, False, 99)
    assert profile.row_ns(Decode(profile=str(file))) == {1: 10.0, 8: 30.5}
    assert profile.apply(Decode()) == Decode()
    assert profile.row_ns(Decode()) == {}


def test_a_profile_leaves_quantized_cells_alone(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    tuned = msgspec.structs.replace(TUNED, cell_layout="streams", flash_attention=False, cell_type="bf16")
    profile.write(file, Profile(decode=tuned, gguf="m.gguf", host={}, seen={}))
    for cell_type, expected in (("f16", ("bf16", False)), ("bf16", ("bf16", False)), ("q8_0", ("q8_0", True))):
        applied = profile.apply(Decode(profile=str(file), cell_type=cell_type))
        assert (applied.cell_type, applied.flash_attention) == expected
        assert (applied.cell_layout, applied.threads) == ("streams", TUNED.threads)


def test_a_profile_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    with pytest.raises(ConfigError, match=r"cannot read .*profile\.json: No such file"):
        profile.apply(Decode(profile=str(file)))
    profile.write(file, Profile(decode=TUNED, gguf="m.gguf", host={}, seen={}))
    good = file.read_text()
    for old, new, reason in (
        ("isthmus.profile/2", "isthmus.profile/9", "tune again"),
        ('"threads": 2', '"threads": 0', r"\$\.decode\.threads"),
        (good, "{", r"profile\.json: Input data was truncated"),
    ):
        file.write_text(good.replace(old, new))
        with pytest.raises(ConfigError, match=reason):
            profile.apply(Decode(profile=str(file)))
