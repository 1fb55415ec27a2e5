from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cpu_decode.geometry import read_geometry
from cpu_decode.llama import Batch, Context, Model
from measurements import synthetic_gguf
from measurements.synthetic_gguf import SHAPES, Shape
from transfer.errors import ConfigError

TINY = Shape(128, 2, 4, 2, 256, 49_160, 10_000.0, output=True)


def test_llama_cpp_computes_finite_logits_over_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    with synthetic_gguf.synthetic_gguf("tiny") as gguf:
        geometry = read_geometry(gguf)
        assert (geometry.num_layers, geometry.num_kv_heads, geometry.vocab_size) == (2, 2, 49_160)
        assert (geometry.head_dim_k, geometry.head_dim_v) == (32, 32)
        model = Model(gguf)
        assert model.piece(49_159) == b"filler7"
        context = Context(model, num_cells=64, max_sequences=1, batch_tokens=8, threads=1, cell_type="f16")
        batch = Batch(8)
        batch.add(0, 0, [1, 2, 3], want_logits=1)
        context.decode(batch)
        logits = context.logits(2)
        assert logits.shape == (49_160,)
        assert np.isfinite(logits).all()
        assert logits.std() > 0
        context.close()
        model.close()
    assert not gguf.exists()


@pytest.mark.parametrize(("name", "millions"), [("360m", 362), ("1b", 1236), ("8b", 8030)])
def test_shapes_have_the_parameters_that_their_models_are_known_for(name: str, millions: int) -> None:
    shape = SHAPES[name]
    head_dim = shape.hidden_size // shape.num_heads
    attention = 2 * shape.hidden_size * (shape.hidden_size + shape.num_kv_heads * head_dim)
    layer = attention + 3 * shape.hidden_size * shape.ffn_size
    embedding = shape.vocab_size * shape.hidden_size * (1 + shape.output)
    assert round((embedding + shape.num_layers * layer) / 1e6) == pytest.approx(millions, abs=1)


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, _: Shape) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(synthetic_gguf, "_write", full)
    with (
        pytest.raises(ConfigError, match=r"cannot write a model of shape 1b to .*: No space left on device"),
        synthetic_gguf.synthetic_gguf("1b"),
    ):
        pass
    with pytest.raises(ConfigError, match="there is no shape '2b'"), synthetic_gguf.synthetic_gguf("2b"):
        pass
