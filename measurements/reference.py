"""The model of a pair's Hugging Face directory: what fp32 predicts, and the KV that it makes in bf16."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from measurements.kv import Logits
from transfer.errors import ConfigError
from transfer.geometry import KVGeometry
from transfer.layout import Elements, RopeOrder, interleaved_index


class Reference:
    """One Hugging Face model, run by transformers on the CPU in ``dtype`` (``float32`` or ``bfloat16``)."""

    def __init__(self, hf_dir: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            self._model = AutoModelForCausalLM.from_pretrained(
                hf_dir, dtype=getattr(torch, dtype), local_files_only=True
            ).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(f"transformers cannot load {hf_dir}: {str(error).strip().splitlines()[0]}") from error

    def predictions(self, prompt: Sequence[int], continuation: Sequence[int], vocab_size: int) -> Logits:
        """Logits for every token of ``continuation``, given the true ones before it: fp32 ``[tokens, vocab_size]``."""
        logits = self._forward([*prompt, *continuation[:-1]]).logits[0, len(prompt) - 1 :, :vocab_size]
        made: Logits = logits.float().numpy()
        return made

    def greedy(self, prompt: Sequence[int], count: int, vocab_size: int) -> list[int]:
        """The ``count`` most likely tokens after ``prompt``, one after another; the end of a text does not end it."""
        made: list[int] = []
        cache, tokens = None, list(prompt)
        for _ in range(count):
            output = self._forward(tokens, cache)
            cache = output.past_key_values
            made.append(int(output.logits[0, -1, :vocab_size].argmax()))
            tokens = made[-1:]
        return made

    def planes(self, prompt: Sequence[int], geometry: KVGeometry, ours: RopeOrder, theirs: RopeOrder) -> list[Elements]:
        """K and V of each layer as :class:`measurements.kv.PromptKV` has them; the model must be in bf16.

        ``ours`` is the order of this model's rotary pairs, ``theirs`` the one wanted. Raises :class:`ConfigError` for
        models with sliding windows, whose cache here forgets what llama.cpp keeps.
        """
        import torch

        if geometry.window_layers:
            raise ConfigError("fidelity of models with sliding windows is not measured yet")
        reorder = interleaved_index(geometry.head_dim_k, geometry.rope_dims) if ours != theirs else None
        planes: list[Elements] = []
        for layer in self._forward(prompt).past_key_values.layers:
            for tensor, order in ((layer.keys, reorder), (layer.values, None)):
                # [1, heads, tokens, head_dim] to a row of all heads for each token.
                rows = tensor[0].transpose(0, 1).contiguous().view(torch.int16).numpy().view(np.uint16)
                planes.append(np.ascontiguousarray(rows if order is None else rows[..., order]).reshape(-1))
        return planes

    def _forward(self, tokens: Sequence[int], cache: Any = None) -> Any:
        import torch

        with torch.inference_mode():
            return self._model(torch.tensor([list(tokens)]), past_key_values=cache, use_cache=True)
