"""``python -m tests.golden.freeze`` adds the bytes of new examples to the frozen files.

What is there is never touched: if the protocol changed on purpose, delete the line by hand in the commit that raises
the version. A message that gained fields with defaults gets its new bytes behind the old ones, which must go on being
understood. The tests only read the files.
"""

from pathlib import Path

from tests.golden import examples
from tests.transfer import plain_frames
from transfer import messages

FOLDER = Path(__file__).parent
FRAMES = FOLDER / "frames.hex"
MESSAGES = FOLDER / "messages.hex"


def read(path: Path) -> dict[str, list[bytes]]:
    """The file's lines, ``name hex [hex]``, by name; "-" is empty."""
    rows = (line.split() for line in path.read_text().splitlines() if line)
    return {name: [bytes.fromhex(part.strip("-")) for part in parts] for name, *parts in rows}


def add(path: Path, rows: dict[str, list[bytes]]) -> None:
    """Append the rows whose names the file lacks."""
    known = read(path) if path.exists() else {}
    with path.open("a") as file:
        for name, parts in rows.items():
            if name not in known:
                file.write(" ".join([name, *(part.hex() or "-" for part in parts)]) + "\n")


def grow(path: Path, rows: dict[str, bytes]) -> None:
    """Append bytes that differ from the newest ones of their name to its line."""
    known = read(path)
    for name, data in rows.items():
        generations = known.setdefault(name, [])
        if not generations or generations[-1] != data:
            generations.append(data)
    path.write_text("".join(" ".join([name, *(part.hex() for part in parts)]) + "\n" for name, parts in known.items()))


if __name__ == "__main__":
    packed = {
        name: [plain_frames.pack(header, payload), payload] for name, (header, payload) in examples.frames().items()
    }
    add(FRAMES, packed)
    grow(MESSAGES, {type(message).__name__: messages.encode(message) for message in examples.MESSAGES})
