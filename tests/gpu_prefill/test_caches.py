"""Ways to run vLLM whose caches are refused, each by name, when vLLM starts."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from gpu_prefill.caches import as_layers, element_of, in_layer_order, require_supported, scales_of  # noqa: E402
from gpu_prefill.extract import Layer  # noqa: E402
from tests.gpu_prefill.test_export import GEOMETRY  # noqa: E402
from transfer.errors import ConfigError, EngineError  # noqa: E402
from transfer.frames import Element  # noqa: E402


class FullAttentionSpec:
    pass


class SlidingWindowSpec:
    pass


class MLAAttentionSpec:
    pass


def vllm_config(prefill_context: int = 1, decode_context: int = 1, lora: object = None) -> Any:
    parallel = SimpleNamespace(
        prefill_context_parallel_size=prefill_context, decode_context_parallel_size=decode_context
    )
    return SimpleNamespace(parallel_config=parallel, lora_config=lora)


def groups_of(*specs: type) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec()) for spec in specs])


def test_one_gpu_with_plain_attention_is_supported() -> None:
    require_supported(vllm_config(), groups_of(FullAttentionSpec))


@pytest.mark.parametrize(
    ("config", "groups", "complaint"),
    [
        (vllm_config(prefill_context=2), groups_of(FullAttentionSpec), "prefill_context_parallel_size to 1, not 2"),
        (vllm_config(decode_context=4), groups_of(FullAttentionSpec), "decode_context_parallel_size to 1, not 4"),
        (vllm_config(lora=object()), groups_of(FullAttentionSpec), "LoRA"),
        (vllm_config(), groups_of(MLAAttentionSpec), "MLA, whose caches hold a latent"),
        (vllm_config(), groups_of(FullAttentionSpec, FullAttentionSpec), "plain attention in every layer"),
        (vllm_config(), groups_of(FullAttentionSpec, SlidingWindowSpec), "caches are FullAttentionSpec, SlidingWindow"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_reason(config: Any, groups: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        require_supported(config, groups)


def caches(*dtypes: Any, width: int = 32) -> list[Any]:
    return [torch.zeros((2, 2, 16, width), dtype=dtype) for dtype in dtypes]


def layers_of(dtypes: tuple[Any, ...], cache_dtype: str = "auto") -> list[Layer]:
    return as_layers(caches(*dtypes), [(0.5, 2.0)] * len(dtypes), cache_dtype)


def test_elements_of_16_bits_are_told_apart() -> None:
    assert element_of(layers_of((torch.bfloat16, torch.bfloat16))) is Element.BF16
    assert element_of(layers_of((torch.float16,))) is Element.F16


@pytest.mark.parametrize(
    ("cache_dtype", "kind"),
    [("fp8", torch.float8_e4m3fn), ("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)],
)
def test_fp8_caches_get_their_type_and_scales(cache_dtype: str, kind: Any) -> None:
    layers = layers_of((torch.uint8, torch.uint8), cache_dtype)
    assert [(layer.cache.dtype, layer.k_scale, layer.v_scale) for layer in layers] == [(kind, 0.5, 2.0)] * 2
    assert element_of(layers) is Element.BF16
    # Scales that vLLM keeps for 16-bit caches too mean nothing there.
    assert layers_of((torch.bfloat16,))[0].k_scale == 1.0


@pytest.mark.parametrize(
    ("dtypes", "cache_dtype", "named"),
    [
        ((torch.uint8, torch.uint8), "nvfp4", "nvfp4, holds torch.uint8"),
        ((torch.uint8,), "auto", "auto, holds torch.uint8"),
        ((torch.float32,), "auto", "auto, holds torch.float32"),
        # Layers that `kv_cache_dtype_skip_layers` names stay in 16 bits beside fp8.
        ((torch.bfloat16, torch.uint8), "fp8", "fp8, holds torch.bfloat16, torch.uint8"),
    ],
)
def test_other_caches_are_refused_by_their_types(dtypes: tuple[Any, ...], cache_dtype: str, named: str) -> None:
    with pytest.raises(ConfigError, match=f"{named}; run it with dtype .* auto or fp8 in every layer"):
        layers_of(dtypes, cache_dtype)


def config_with(k_scale: Any, **cache_config: object) -> Any:
    layer = SimpleNamespace(_k_scale=k_scale, _v_scale=torch.tensor(2.0))
    compilation = SimpleNamespace(static_forward_context={"a": layer})
    return SimpleNamespace(cache_config=SimpleNamespace(**cache_config), compilation_config=compilation)


def test_scales_are_one_number_for_k_and_one_for_v() -> None:
    assert scales_of(config_with(torch.tensor([0.25])), ["a"]) == [(0.25, 2.0)]
    with pytest.raises(ConfigError, match="a has an fp8 scale for each head"):
        scales_of(config_with(torch.ones(2)), ["a"])
    with pytest.raises(ConfigError, match="leave calculate_kv_scales off"):
        scales_of(config_with(torch.ones(1), calculate_kv_scales=True), ["a"])


def test_caches_of_another_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Importing vLLM changes the process too much for a test among others.
    by_number = SimpleNamespace(extract_layer_index=lambda name: int(name.split(".")[1]))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.utils", by_number)
    named = {f"layers.{index}.attn": cache for index, cache in enumerate(caches(*[torch.bfloat16] * 2, width=64))}
    with pytest.raises(EngineError, match=r"should be \(2, 32\)"):
        in_layer_order(named, GEOMETRY)


def test_caches_come_in_the_layers_order(monkeypatch: pytest.MonkeyPatch) -> None:
    by_number = SimpleNamespace(extract_layer_index=lambda name: int(name.split(".")[1]))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.utils", by_number)
    first, second = caches(torch.bfloat16, torch.bfloat16)
    found = in_layer_order({"layers.10.attn": second, "layers.9.attn": first}, GEOMETRY)
    assert found[0] is first
    assert found[1] is second
