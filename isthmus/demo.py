"""``isthmus demo``: the whole stack on this host, one question, and what it cost."""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path

import msgspec
from rich.console import Console

from isthmus.ask import Answer, ask, request_body
from isthmus.compare import compare_routes
from isthmus.ledger_table import ledger_table
from isthmus.pair import default_pair
from isthmus.up import Stack, cluster_on_free_ports, with_ledger
from transfer.config import Cluster

MAX_TOKENS = 64


def run(*, compare: bool, keep: bool, runs: int, codec: str) -> None:
    """Start the stack with the default pair, ask, print; with ``keep``, stay until Ctrl-C."""
    console = Console(stderr=True)
    console.print("preparing the default model pair", highlight=False)
    cluster = cluster_on_free_ports(default_pair())
    cluster = msgspec.structs.replace(
        cluster,
        link=msgspec.structs.replace(cluster.link, codec=codec),
        # A comparison must pay for every prefill.
        prefill=msgspec.structs.replace(cluster.prefill, prefix_caching=not compare),
        decode=msgspec.structs.replace(cluster.decode, pool_mib=0) if compare else cluster.decode,
        # And nobody else is to compute meanwhile.
        proxy=msgspec.structs.replace(cluster.proxy, parity_share=0.0) if compare else cluster.proxy,
    )
    log_dir = Path(tempfile.mkdtemp(prefix="isthmus-logs-"))
    cluster = with_ledger(cluster, log_dir / "ledger.sqlite")
    console.print(f"starting vLLM, llama.cpp and the proxy; logs in {log_dir}", highlight=False)
    with Stack(cluster, log_dir, console=console) as stack:
        if compare:
            compare_routes(stack, question(), cluster.pair.name, runs=runs, max_tokens=MAX_TOKENS)
        else:
            show_one(stack, cluster)
        if keep:
            keep_up(stack, cluster)
    shutil.rmtree(log_dir)


def question() -> str:
    """The text that ships with Isthmus and the question about it: about 1,000 tokens."""
    return (resources.files("isthmus") / "prompts" / "first_light.txt").read_text(encoding="utf-8").strip()


def show_one(stack: Stack, cluster: Cluster) -> Answer:
    """Ask once, printing the answer as it streams and then its ledger entry."""
    text = question()
    console = Console()
    console.print(f"\n[dim]… {len(text.split())} words, ending:[/] [bold]{text.splitlines()[-1]}[/]\n", highlight=False)

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    answer = ask(
        stack.proxy_url, request_body(cluster.pair.name, text, max_tokens=MAX_TOKENS), route=None, on_text=show
    )
    console.print("\n")
    console.print(ledger_table(answer.ledger))
    return answer


def keep_up(stack: Stack, cluster: Cluster) -> None:
    """Say how to talk to the stack, and wait for Ctrl-C."""
    url, model = stack.proxy_url, cluster.pair.name
    lines = f"""
The stack stays up until Ctrl-C. With curl:

  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "What is an isthmus?"}}]}}'

With OpenAI's Python SDK:

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  messages = [{{"role": "user", "content": "What is an isthmus?"}}]
  for chunk in client.chat.completions.create(model="{model}", messages=messages, stream=True):
      print(chunk.choices[0].delta.content or "", end="", flush=True)

What requests cost: {url}/ledger   Metrics: {url}/metrics
"""
    Console().print(lines, markup=False, highlight=False, soft_wrap=True)
    try:
        stack.wait()
    except KeyboardInterrupt:
        Console(stderr=True).print("ending")
