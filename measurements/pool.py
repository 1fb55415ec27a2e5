"""What the KV pool saves: the time to a repeated prompt's first token by tier, and what conversations send."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cpu_decode.pool import block_files
from measurements import picture, pool_eviction, pool_targets, prompts, result, targets
from measurements.pool_stack import Answer, PoolStack, redis_server
from measurements.pool_targets import LIMITS
from transfer.blocks import BLOCK_TOKENS

# 63 blocks of 64 tokens and the one whose logits are wanted.
PROMPT_TOKENS = 4033
ANSWER_TOKENS = 16
BACKGROUND_TOKENS = 1500
TURNS, TURN_CHARACTERS, TURN_ANSWER_TOKENS = 20, 200, 48
# Answers are compared on prompts of text, of 8 blocks and one token.
QUESTIONS, QUESTION_TOKENS = 6, 513
SESSIONS, SYSTEM_TOKENS, SESSION_TOKENS = 32, 2000, 49
RAM_MIB, DISK_MIB = 2048, 4096
TIERS = ("cells", "ram", "disk", "shared")

Sample = dict[str, Any]


def run(json: Path | None, plot: Path | None, rounds: int) -> None:
    """Measure with the default model; print a table, write ``json`` and draw ``plot`` if given.

    Raises :class:`ConfigError` if a file cannot be written or no Redis-protocol server is installed, and
    :class:`EngineError` if a node fails.
    """
    if plot is not None:
        import matplotlib as _  # noqa: F401
    from isthmus.pair import default_pair

    environment = result.environment()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="isthmus-pool-") as temporary:
        folder = Path(temporary)
        with redis_server(folder) as url, PoolStack(default_pair(), folder, console) as stack:
            samples = [*pool_eviction.simulate(), *measure(stack, folder / "blocks", url, rounds, console)]
    summary = summarize(samples)
    found = list(pool_targets.verdicts(summary))
    summary["targets"] = [each._asdict() | {"passed": each.passed} for each in found]
    if json is not None:
        result.write(json, "pool", environment, samples, summary)
    if plot is not None:
        draw(summary, samples, plot)
    for made in (*tables(summary), targets.table(found)):
        Console().print(made)


def measure(stack: PoolStack, folder: Path, url: str, rounds: int, console: Console) -> Iterator[Sample]:
    """Every part with the real stack: first all that one worker shows, then a restart for each tier below RAM."""
    random = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        # The default model's vocabulary, without its special tokens.
        return [int(token) for token in random.integers(100, 40_000, count)]

    def in_turn(tier: str) -> Iterator[Sample]:
        for turn, prompt in enumerate(repeated):
            yield _ttft(tier, turn, stack.ask(prompt, ANSWER_TOKENS, "cpu"))
        for prompt, text in zip(questions, texts, strict=True):
            yield _same(tier, stack.ask(prompt, ANSWER_TOKENS, "cpu", alone=True), text)

    disk = {"disk_pool_dir": str(folder), "disk_pool_mib": DISK_MIB}
    repeated = [tokens(PROMPT_TOKENS) for _ in range(rounds)]
    story = prompts.texts()["prose"]
    questions = [
        stack.tokenize(f"Part {part} of a story. {story[part * 300 :]}")[:QUESTION_TOKENS] for part in range(QUESTIONS)
    ]
    texts: list[str] = []
    with stack.worker(pool_mib=RAM_MIB, shared_pool_url=url, **disk):
        stack.ask(tokens(PROMPT_TOKENS), ANSWER_TOKENS, "split")
        for turn, prompt in enumerate(repeated):
            console.print(f"prompt {turn + 1} of {rounds}", highlight=False)
            cold = stack.ask(prompt, ANSWER_TOKENS, "split")
            yield _ttft("cold", turn, cold)
            with stack.asking(prompt, BACKGROUND_TOKENS, "cpu") as background:
                next(background)
                yield _ttft("cells", turn, stack.ask(prompt, ANSWER_TOKENS, "cpu"))
        for prompt in questions:
            texts.append(stack.ask(prompt, ANSWER_TOKENS, "split", alone=True).text)
            with stack.asking(prompt, BACKGROUND_TOKENS, "cpu") as background:
                next(background)
                yield _same("cells", stack.ask(prompt, ANSWER_TOKENS, "cpu", alone=True), texts[-1])
        yield from in_turn("ram")
        blocks = (rounds + 1) * (PROMPT_TOKENS // BLOCK_TOKENS) + QUESTIONS * (QUESTION_TOKENS // BLOCK_TOKENS)
        for tier in ("disk", "shared"):
            stack.settle(tier, blocks)
        console.print("conversation", highlight=False)
        yield from conversation(stack)
        console.print("sessions", highlight=False)
        yield from sessions(stack, tokens)
    for tier, pool in (("disk", disk), ("shared", {"shared_pool_url": url})):
        console.print(f"after a restart, from {tier}", highlight=False)
        _drop_page_cache(folder)
        with stack.worker(pool_mib=RAM_MIB, **pool):
            if tier == "disk":
                stack.settle(tier, blocks)
            yield from in_turn(tier)
            yield {"part": "tier", **stack.tiers()[tier]}


def conversation(stack: PoolStack) -> Iterator[Sample]:
    """Turn after turn by route split, each with all that was said before: what was sent and computed for it."""
    story, said = prompts.texts()["prose"], ""
    for turn in range(TURNS):
        # Parts of the story, in an order of its own: no turn repeats another.
        question = " ".join(story[at % len(story) :][:TURN_CHARACTERS] for at in (997 * turn, 1499 * turn + 500))
        said += f"Question {turn}: {question}\nAnswer:"
        answer = stack.ask(said, TURN_ANSWER_TOKENS, "split")
        said += answer.text + "\n"
        yield _sent("conversation", turn, answer.entry)


def sessions(stack: PoolStack, tokens: Callable[[int], list[int]]) -> Iterator[Sample]:
    """One system prompt, many sessions behind it: what each sends, and what all of them store."""
    system = tokens(SYSTEM_TOKENS)
    before = stack.settled_tiers()
    for number in range(SESSIONS):
        answer = stack.ask([*system, *tokens(SESSION_TOKENS)], ANSWER_TOKENS, "split")
        yield _sent("session", number, answer.entry)
    after = stack.settled_tiers()
    for tier in ("ram", "disk", "shared"):
        yield {"part": "stored", "tier": tier, "blocks": after[tier]["blocks"] - before[tier]["blocks"]}


def summarize(samples: list[Sample]) -> dict[str, Any]:
    """Medians by tier and as shares of the cold one's; sums of tokens and bytes; hit rates."""
    ttft = {
        tier: float(np.median([s["ttft_s"] for s in samples if s["part"] == "ttft" and s["tier"] == tier]))
        for tier in ("cold", *TIERS)
    }
    answers = [s for s in samples if s["part"] == "answer"]
    turns, each = ([s for s in samples if s["part"] == part] for part in ("conversation", "session"))
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "ttft_s": ttft,
        "share_of_cold": {tier: ttft[tier] / ttft["cold"] for tier in TIERS},
        "limits": LIMITS,
        "same_answers": sum(s["same"] for s in answers),
        "answers": len(answers),
        "read_bytes_per_s": {s["name"]: s["read_bytes_per_s"] for s in samples if s["part"] == "tier"},
        "conversation": _totals(turns),
        "conversation_growth": pool_targets.growth(turns),
        "sessions": _shared_prompt(each, {s["tier"]: s["blocks"] for s in samples if s["part"] == "stored"}),
        "eviction": [s for s in samples if s["part"] == "eviction"],
    }


def tables(summary: dict[str, Any]) -> Iterator[Table]:
    """The summary for people."""
    made = Table(title=f"TTFT of a repeated prompt of {summary['prompt_tokens']:,} tokens", title_justify="left")
    for column in ("from", "s", "of cold", "at most"):
        made.add_column(column, justify="left" if column == "from" else "right")
    for tier, seconds in summary["ttft_s"].items():
        share = summary["share_of_cold"].get(tier)
        limit = summary["limits"].get(tier)
        made.add_row(tier, f"{seconds:.3f}", f"{share:.3f}" if share else "", f"{limit:.2f}" if limit else "")
    made.caption = f"{summary['same_answers']} of {summary['answers']} answers as the cold ones"
    yield made
    made = Table(title="what was new, and what was sent for it", title_justify="left")
    for column in ("", "requests", "prompt tokens", "reused", "not reused", "MiB sent", "MiB without a pool"):
        made.add_column(column, justify="right" if column else "left")
    for name in ("conversation", "sessions"):
        row = summary[name]
        counts = (f"{row[key]:,}" for key in ("requests", "prompt_tokens", "reused_tokens", "new_tokens"))
        made.add_row(name, *counts, *(f"{row[key] / 2**20:,.1f}" for key in ("wire_bytes", "unpooled_bytes")))
    stored = ", ".join(f"{blocks} in {tier}" for tier, blocks in summary["sessions"]["stored_blocks"].items())
    made.caption = f"the sessions stored these blocks: {stored}"
    yield made
    made = Table(title="hit rate, Zipf's law", title_justify="left")
    for column in ("exponent", "scans", "the pool's tree", "LRU"):
        made.add_column(column, justify="right")
    for row in summary["eviction"]:
        made.add_row(f"{row['exponent']:g}", "yes" if row["scan"] else "", f"{row['tree']:.3f}", f"{row['lru']:.3f}")
    yield made


def draw(summary: dict[str, Any], samples: list[Sample], path: Path) -> None:
    """TTFT by tier; tokens and bytes by turn; hit rates. The format is by ``path``'s name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.8), layout="constrained")
    ttft, tokens, wire, hits = figure.subplots(1, 4)
    ttft.bar(list(summary["ttft_s"]), list(summary["ttft_s"].values()), color="tab:blue")
    for tier, limit in summary["limits"].items():
        at = list(summary["ttft_s"]).index(tier)
        ttft.plot([at - 0.4, at + 0.4], [limit * summary["ttft_s"]["cold"]] * 2, color="tab:red")
    ttft.set(ylabel="s (red: the limit)", title=f"TTFT, {summary['prompt_tokens']:,} tokens again", yscale="log")
    turns = [s for s in samples if s["part"] == "conversation"]
    numbers = [s["number"] + 1 for s in turns]
    tokens.plot(numbers, [s["prompt_tokens"] for s in turns], label="prompt", color="tab:grey")
    tokens.plot(numbers, [s["new_tokens"] for s in turns], label="computed", color="tab:blue")
    tokens.set(xlabel="turn", ylabel="tokens", title="a conversation computes what is new", ylim=(0, None))
    tokens.legend(fontsize=7)
    wire.plot(numbers, [s["unpooled_bytes"] / 2**20 for s in turns], label="without a pool", color="tab:grey")
    wire.plot(numbers, [s["wire_bytes"] / 2**20 for s in turns], label="sent", color="tab:blue")
    wire.set(xlabel="turn", ylabel="MiB", title="and sends it", ylim=(0, None))
    wire.legend(fontsize=7)
    names = [f"{row['exponent']:g}{' scans' if row['scan'] else ''}" for row in summary["eviction"]]
    places = np.arange(len(names))
    hits.bar(places - 0.2, [row["tree"] for row in summary["eviction"]], 0.4, label="the pool's tree", color="tab:blue")
    hits.bar(places + 0.2, [row["lru"] for row in summary["eviction"]], 0.4, label="LRU", color="tab:grey")
    hits.set_xticks(places, names, rotation=30)
    hits.set(ylabel="hit rate", title="prompts by Zipf's law")
    hits.legend(fontsize=7)
    picture.save(figure, path)


def _ttft(tier: str, turn: int, answer: Answer) -> Sample:
    return {
        "part": "ttft",
        "tier": tier,
        "round": turn,
        "ttft_s": answer.ttft_s,
        "reused_tokens": answer.entry["kv_reused_tokens"],
    }


def _same(tier: str, answer: Answer, expected: str) -> Sample:
    reused_tokens = answer.entry["kv_reused_tokens"]
    return {"part": "answer", "tier": tier, "reused_tokens": reused_tokens, "same": answer.text == expected}


def _sent(part: str, number: int, entry: dict[str, Any]) -> Sample:
    new_tokens = entry["prompt_tokens"] - entry["kv_reused_tokens"]
    token_bytes = entry["kv_wire_bytes"] / new_tokens if new_tokens else 0.0
    return {
        "part": part,
        "number": number,
        "prompt_tokens": entry["prompt_tokens"],
        "reused_tokens": entry["kv_reused_tokens"],
        "new_tokens": new_tokens,
        "wire_bytes": entry["kv_wire_bytes"],
        "unpooled_bytes": round(token_bytes * entry["prompt_tokens"]),
    }


def _shared_prompt(samples: list[Sample], stored_blocks: dict[str, int]) -> dict[str, Any]:
    """Totals of the sessions, and how often the prompt that they share was stored and sent, as far as blocks tell.

    Each session has a full block of its own behind the shared ones, and in RAM a shorter one behind that.
    """
    totals = _totals(samples)
    own = {tier: len(samples) * (2 if tier == "ram" else 1) for tier in stored_blocks}
    return totals | {
        "stored_blocks": stored_blocks,
        "stored_times": {
            tier: (blocks - own[tier]) / (SYSTEM_TOKENS // BLOCK_TOKENS) for tier, blocks in stored_blocks.items()
        },
        "sent_times": (totals["new_tokens"] - SESSION_TOKENS * len(samples)) / SYSTEM_TOKENS,
    }


def _totals(samples: list[Sample]) -> dict[str, Any]:
    keys = ("prompt_tokens", "reused_tokens", "new_tokens", "wire_bytes", "unpooled_bytes")
    return {"requests": len(samples)} | {key: sum(s[key] for s in samples) for key in keys}


def _drop_page_cache(folder: Path) -> None:
    """Make the next reads of all blocks come from the disk."""
    for part in block_files.parts(folder):
        for path in block_files.walk(part):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
