"""Chat template and tokenizer: text becomes token ids once, here; the ids are the truth on every node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2 import TemplateError

from proxy import infill
from proxy.tools import spell_out
from proxy.vocabulary import Vocabulary
from transfer.errors import ConfigError, RequestError

T = TypeVar("T")


class Renderer:
    """The pair's tokenizer on a thread of its own: it takes milliseconds and is not safe to share."""

    def __init__(self, hf_dir: str) -> None:
        self._hf_dir = hf_dir
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render")
        self._tokenizer: Any = None
        self._infill: infill.Infill | None = None
        self.vocabulary: Vocabulary

    async def load(self) -> None:
        """Read tokenizer and vocabulary from the pair's folder; :class:`ConfigError` if they cannot be read."""
        self._tokenizer, self.vocabulary = await self._run(self._load)
        self._infill = infill.find(self._tokenizer.get_vocab())

    async def chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        options: dict[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, with the template's opening of the assistant's turn.

        ``options`` are what the template is called with instead (``turns.TemplateFields``).
        """
        return await self._run(lambda: self._chat(messages, tools or [], options or {"add_generation_prompt": True}))

    async def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of any text, even an empty one."""
        return await self._run(lambda: list(self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids))

    @property
    def response_template(self) -> dict[str, Any] | None:
        """How the model's answers are to be read, if its tokenizer says so."""
        return getattr(self._tokenizer, "response_template", None)

    def tokenizer_info(self) -> dict[str, Any]:
        """What clients need to know that render conversations themselves: class, special tokens, chat template."""
        tokenizer = self._tokenizer
        special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return {"tokenizer_class": type(tokenizer).__name__, "chat_template": tokenizer.chat_template, **special}

    async def completion(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a bare prompt, with the tokenizer's special tokens; ids are checked and passed on."""
        return await self._run(lambda: self._completion(prompt))

    async def between(self, before: str | list[int], after: str) -> list[int]:
        """Token ids that ask for what stands between two texts; :class:`RequestError` if the model cannot be asked."""
        marks = self._infill
        if marks is None:
            raise RequestError(
                "suffix: this model has no tokens for filling a gap, such as <|fim_prefix|>; leave it out", "suffix"
            )
        return await self._run(lambda: self._between(marks, before, after))

    @property
    def gap_ends(self) -> tuple[int, ...]:
        """Tokens by which the model says that a gap is filled, beside those that end everything."""
        return self._infill.ends if self._infill else ()

    def require_known(self, token_ids: Iterable[int], param: str) -> None:
        """Raise :class:`RequestError` about the first id in the request's field ``param`` that is not a token."""
        vocab_size = len(self._tokenizer)
        unknown = next((token for token in token_ids if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise RequestError(f"token id {unknown} is not in the vocabulary of {vocab_size}", param)

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _load(self) -> tuple[Any, Vocabulary]:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._hf_dir, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read a tokenizer from pair.hf_dir = {self._hf_dir}: {error}") from None
        return tokenizer, Vocabulary(tokenizer)

    def _chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        if not self._tokenizer.chat_template:
            raise RequestError("this model has no chat template; use /v1/completions", "messages")
        if not self._template_knows_tools():
            messages, tools = spell_out(messages, tools), []
        try:
            text = self._tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, **options)
        # transformers refuses what it cannot continue with a ValueError.
        except (TemplateError, ValueError) as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}", "messages") from None
        # The template has written the special tokens already.
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _template_knows_tools(self) -> bool:
        """Whether calls come out of the template in a form that can be read back."""
        return self.response_template is not None or "<tool_call>" in str(self._tokenizer.chat_template)

    def _completion(self, prompt: str | list[int]) -> list[int]:
        token_ids = list(self._tokenizer(prompt).input_ids) if isinstance(prompt, str) else prompt
        if not token_ids:
            raise RequestError("the prompt is empty", "prompt")
        self.require_known(token_ids, "prompt")
        return token_ids

    def _between(self, marks: infill.Infill, before: str | list[int], after: str) -> list[int]:
        def tokenize(text: str) -> list[int]:
            return list(self._tokenizer(text, add_special_tokens=False).input_ids)

        if isinstance(before, str):
            bos = self._tokenizer.bos_token_id
            begin = [bos] if bos is not None and list(self._tokenizer("").input_ids)[:1] == [bos] else []
            first = tokenize(before)
        else:
            self.require_known(before, "prompt")
            begin, first = [], before
        rest = infill.continued(after, tokenize, byte_level=self.vocabulary.byte_level)
        return begin + marks.prompt(first, rest)
