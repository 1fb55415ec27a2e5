"""OpenAI's request schemas, as far as this proxy serves them, and what it says about the rest.

Fields that OpenAI has and we do not know are ignored, as OpenAI ignores them; fields whose effect we lack are refused
by name. ``top_k``, ``min_p``, ``repetition_penalty``, ``ignore_eos``, ``min_tokens`` and ``stop_token_ids`` are vLLM's;
``typical_p``, ``xtc_*``, ``dry_*`` and ``timings_per_token`` llama-server's; ``isthmus`` asks for the ledger.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from proxy import constraints
from proxy.constraints import Choices, Constraint, Grammar, Regex, ResponseFormat, Schema, StructuredOutputs
from proxy.failures import UnknownModelError
from proxy.logprobs import MAX_TOP
from proxy.tools import MAX_TOOLS, Function, FunctionChoice, Tool, ToolChoice, ToolUse, use, use_of_functions
from proxy.turns import TemplateFields, Turn, for_template
from transfer.errors import RequestError
from transfer.messages import Sampling

MAX_STOPS = 16
MAX_CHOICES = 16
MAX_PROMPTS = 64
COMPLETION_MAX_TOKENS = 16
# Before a text is tokenized: what English takes.
CHARACTERS_PER_TOKEN = 4
_INT64 = 2**63

Prompt = str | list[int]
# Fields that Sampling spells alike, with its own defaults.
_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "seed",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
    "xtc_probability",
    "xtc_threshold",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def as_prompts(value: object) -> object:
    """A list of prompts out of OpenAI's four forms: text, ids, or a list of either."""
    several = isinstance(value, list) and bool(value) and not _are_ids(value)
    prompts = value if several and isinstance(value, list) else [value]
    for prompt in prompts:
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and _are_ids(prompt)):
            raise ValueError("must be a string, a list of token ids, or a list of those, and not empty")
    return prompts


def _are_ids(value: list[object]) -> bool:
    return all(type(token) is int for token in value)


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(_Schema):
    """What else a stream carries."""

    include_usage: bool | None = False


class _Body(_Schema):
    """What both endpoints take. ``null`` means the default, as with OpenAI."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop: (
        Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS), BeforeValidator(_as_list)]
        | None
    ) = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=128)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    logit_bias: (
        Annotated[dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = None
    ignore_eos: bool | None = None
    xtc_probability: Annotated[float, Field(ge=0, le=1)] | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    dry_multiplier: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    dry_base: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    dry_allowed_length: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    dry_penalty_last_n: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    dry_sequence_breakers: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=64)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: Regex | None = None
    guided_choice: Choices | None = None
    guided_grammar: Grammar | None = None
    json_schema: Schema | None = None
    grammar: Grammar | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    timings_per_token: bool | None = None
    isthmus: bool | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None for what the context leaves."""
        return self.max_tokens

    @property
    def choices(self) -> int:
        """Answers to make for each prompt."""
        return _or(self.n, 1)

    @property
    def kept_choices(self) -> int:
        """Answers to send for each prompt."""
        return self.choices

    @property
    def num_top(self) -> int | None:
        """Alternatives to report with each token's log probability; None if nothing is to be reported."""
        return None

    @property
    def echoes_logprobs(self) -> bool:
        """Whether the log probabilities of the prompt's tokens are asked for."""
        return False

    def sampling(self, max_tokens: int) -> Sampling:
        """How both engines shall pick tokens; :class:`RequestError` if ``max_tokens`` is under ``min_tokens``."""
        if _or(self.min_tokens, 0) > max_tokens:
            raise RequestError(f"min_tokens = {self.min_tokens} is over max_tokens = {max_tokens}", "min_tokens")
        fields = {field: value for field in _SAMPLING_FIELDS if (value := getattr(self, field)) is not None}
        if self.dry_sequence_breakers is not None:
            fields["dry_sequence_breakers"] = tuple(self.dry_sequence_breakers)
        return Sampling(
            max_tokens=max_tokens,
            top_k=max(0, _or(self.top_k, 0)),
            logit_bias=self.logit_bias or {},
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=self.num_top,
            **self.constraint._asdict(),
            **fields,
        )

    @cached_property
    def constraint(self) -> Constraint:
        """What the answer must match; nothing for free text."""
        return constraints.only(self._constraints()) or Constraint()

    def check(self) -> None:
        """Raise :class:`RequestError` about fields that contradict each other or whose effect we lack."""
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs cannot be streamed; leave it or stream out", "prompt_logprobs")
        # A bad schema is found here, before anything is reserved.
        _ = self.constraint

    def _constraints(self) -> dict[str, Constraint | None]:
        """The fields that constrain the answer, with what they ask for."""
        schemas = {
            "response_format": constraints.of_format(self.response_format),
            "guided_json": constraints.parsed(self.guided_json, "guided_json"),
            "json_schema": self.json_schema,
        }
        return {param: constraints.of_schema(schema, param) for param, schema in schemas.items()} | {
            "structured_outputs": constraints.of_outputs(self.structured_outputs),
            "guided_regex": constraints.of_regex(self.guided_regex),
            "guided_choice": constraints.of_choices(self.guided_choice),
            "guided_grammar": constraints.of_grammar(self.guided_grammar),
            "grammar": constraints.of_grammar(self.grammar),
        }


class ChatBody(_Body, TemplateFields):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], Field(max_length=MAX_TOOLS)] | None = None
    function_call: FunctionChoice | None = None

    @property
    def token_limit(self) -> int | None:
        """``max_completion_tokens`` under its new name or its old one."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top(self) -> int | None:
        """``logprobs`` turns them on, ``top_logprobs`` says how many."""
        return _or(self.top_logprobs, 0) if self.logprobs else None

    @property
    def guessed_prompt_tokens(self) -> int:
        """About how many tokens the conversation has, by its length."""
        return 1 + sum(len(turn.content or "") for turn in self.messages) // CHARACTERS_PER_TOKEN

    @cached_property
    def tool_use(self) -> ToolUse | None:
        """Which tools the model may call, if any."""
        if self.functions:
            return use_of_functions(self.functions, self.function_call)
        return use(self.tools, self.tool_choice, parallel=_or(self.parallel_tool_calls, True))

    def turns(self) -> list[dict[str, Any]]:
        """The messages as chat templates know them."""
        return for_template(self.messages)

    def _constraints(self) -> dict[str, Constraint | None]:
        """An answer that must be a call is nothing else."""
        calls = self.tool_use.schema() if self.tool_use else None
        return {"tools": constraints.of_schema(calls, "tools")} if calls else super()._constraints()

    def check(self) -> None:
        """As for all bodies, and what only chat has."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs = true", "top_logprobs")
        if self.functions and (self.tools or self.tool_choice):
            raise RequestError("functions are the older form of tools; give one of them", "functions")
        if self.function_call not in (None, "none", "auto") and not self.functions:
            raise RequestError("function_call needs functions", "function_call")
        for tool in self.tools or ():
            constraints.encoded(tool.function.parameters or {}, "tools")
        for function in self.functions or ():
            constraints.encoded(function.parameters or {}, "functions")
        self.turns()
        self.template_options()


class CompletionBody(_Body):
    """``POST /v1/completions``."""

    prompt: Annotated[list[Prompt], Field(max_length=MAX_PROMPTS), BeforeValidator(as_prompts)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: str | None = None

    @property
    def token_limit(self) -> int | None:
        """OpenAI's default for this endpoint is 16."""
        return _or(self.max_tokens, COMPLETION_MAX_TOKENS)

    @property
    def choices(self) -> int:
        """``best_of`` are made."""
        return max(_or(self.n, 1), _or(self.best_of, 1))

    @property
    def kept_choices(self) -> int:
        """``n`` are sent."""
        return _or(self.n, 1)

    @property
    def num_top(self) -> int | None:
        """``best_of`` needs the log probabilities even if the client does not."""
        return 0 if self.logprobs is None and self.choices > self.kept_choices else self.logprobs

    @property
    def echoes_logprobs(self) -> bool:
        """Scoring a prompt; so is an echo without any answer, which only vLLM gives."""
        return bool(self.echo) and (self.logprobs is not None or self.max_tokens == 0)

    def check(self) -> None:
        """As for all bodies, and what only completions have."""
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens = 0 needs echo = true", "max_tokens")
        if self.suffix and self.echo:
            raise RequestError("echo would repeat the suffix, too; leave one of them out", "suffix")
        if _or(self.best_of, self.kept_choices) < self.kept_choices:
            raise RequestError(f"best_of = {self.best_of} is under n = {self.n}", "best_of")
        if self.stream and self.choices > self.kept_choices:
            raise RequestError("best_of cannot be streamed; leave it or stream out", "best_of")

    @property
    def guessed_prompt_tokens(self) -> int:
        """About how many tokens all prompts have, by their length."""
        sizes = (len(each) // (CHARACTERS_PER_TOKEN if isinstance(each, str) else 1) for each in self.prompt)
        return 1 + sum(sizes) + len(self.prompt) * (len(self.suffix or "") // CHARACTERS_PER_TOKEN)

    def apart(self) -> list[CompletionBody]:
        """One body for each prompt."""
        return [self.model_copy(update={"prompt": [prompt]}) for prompt in self.prompt]


Body = ChatBody | CompletionBody
B = TypeVar("B", ChatBody, CompletionBody)
V = TypeVar("V")


def require_model(asked: str, served: str) -> None:
    """Raise :class:`UnknownModelError` unless the two are the same."""
    if asked != served:
        raise UnknownModelError(f"the model {asked!r} does not exist; this cluster serves {served!r}", "model")


def _or(value: V | None, default: V) -> V:
    return default if value is None else value
