"""``vllm bench serve`` as a process that stays: its imports take longer than most runs.

Reads one run a line from stdin, its arguments as a JSON list, and answers each with a JSON object. What the generator
prints goes to stderr. Run by the Python that has vLLM; needs nothing of Isthmus.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    """Serve runs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(_answer(serve, parser, json.loads(line))) + "\n")


def _answer(serve: Any, parser: Any, arguments: list[str]) -> dict[str, Any]:
    try:
        serve(parser.parse_args(arguments))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the caller is told, and decides
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


if __name__ == "__main__":
    main()
