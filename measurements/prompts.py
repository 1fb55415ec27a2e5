"""Prompts of several kinds, always the same for one version of Isthmus."""

from __future__ import annotations

from pathlib import Path

import isthmus
from transfer import frames, messages

_CHAT = """<|im_start|>system
You are a patient technician who answers in short, numbered steps.<|im_end|>
<|im_start|>user
My old server has two sockets and sixteen memory slots, and I only have eight identical modules. Where do they go, and \
does it matter?<|im_end|>
<|im_start|>assistant
It matters a good deal. 1. Give each socket four modules. 2. Put one module on each channel before you put a second \
one on any channel. 3. Start with the slot that lies farthest from the processor on every channel; most boards paint \
it in another colour. 4. Boot once and look at the speed that the firmware reports.<|im_end|>
<|im_start|>user
The firmware now says the memory runs slower than what is printed on the modules. What did I do wrong?<|im_end|>
<|im_start|>assistant
Probably nothing. 1. Look up what your processor supports with one module on each channel; the printed speed is only \
what the module could do. 2. If the processor supports more than the firmware reports, load the firmware's defaults. \
3. If nothing changes, take out one pair at a time until the speed goes up; the last pair you took out is the one that \
holds the others back.<|im_end|>
"""


def texts() -> dict[str, str]:
    """Text by name: prose, code, a protocol's documentation, a conversation, a table, a search for one line."""
    story = (Path(isthmus.__file__).parent / "prompts" / "first_light.txt").read_text()
    return {
        "prose": story,
        "code": Path(messages.__file__).read_text()[:6000],
        "documentation": frames.__doc__ or "",
        "chat": _CHAT,
        "table": _table(),
        "retrieval": _retrieval(story),
    }


def _table() -> str:
    rows = [f"{day:>3} | {(day * 37) % 91:>4} | {(day * day) % 53:>4} | {day * 1.25:>7.2f}" for day in range(1, 41)]
    return "\n".join(
        ["day | sold | left | revenue", *rows, "", "The table has four columns: day, sold, left, revenue."]
    )


def _retrieval(story: str) -> str:
    """Drawers and keys with part of a story between the list and the question, which is answered at once."""
    drawers = [f"Drawer {n} holds key {(n * 7919) % 9973}." for n in range(1, 25)]
    question = "\n\nWhich keys do the first drawers hold? Once more, word for word, in the same order:\n"
    return "\n".join(drawers) + "\n\n" + story[:1500] + question + "\n".join(drawers[:6])
