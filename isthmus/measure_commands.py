"""``isthmus measure``: one subcommand a question; each imports what answers it when it runs."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from isthmus.output_file import OutputFile
from transfer.codecs import CODECS
from transfer.config import Pair, load
from transfer.errors import ConfigError

PICTURES = (".png", ".svg", ".pdf")

json_option = click.option("--json", type=OutputFile(), help="Write samples, summary and environment to this file.")
plot_option = click.option(
    "--plot", type=OutputFile(*PICTURES), help="Draw the summary into this file: .png, .svg or .pdf."
)


@click.group()
def measure() -> None:
    """Measure something on this host; results hold every sample, the machine and the command."""


@measure.command("codec")
@json_option
@plot_option
@click.option("--rounds", type=click.IntRange(1, 1000), default=9, show_default=True, help="Rounds of the speed part.")
def measure_codec(json: Path | None, plot: Path | None, rounds: int) -> None:
    """Size, speed and fidelity of every codec, on KV of real prompts through the default model."""
    from measurements.codec import run

    run(json, plot, rounds)


@measure.command("prefill")
@json_option
@plot_option
@click.option("--rounds", type=click.IntRange(1, 1000), default=7, show_default=True, help="Rounds, interleaved.")
def measure_prefill(json: Path | None, plot: Path | None, rounds: int) -> None:
    """Prefill in vLLM by prompt length and cached prefix; with and without exporting the KV.

    Starts two servers with the default model.
    """
    from measurements.prefill import run

    run(json, plot, rounds)


@measure.command("proxy")
@json_option
@plot_option
@click.option("--quick", is_flag=True, help="Few rounds and requests: about ten minutes on two cores.")
def measure_proxy(json: Path | None, plot: Path | None, quick: bool) -> None:
    """What the proxy adds to an engine, how many streams it holds, what a split loses, and what `auto` finds.

    Starts the whole stack with the default model. Requests come from `vllm bench serve`.
    """
    from measurements.proxy import FULL, QUICK, run

    run(json, plot, QUICK if quick else FULL)


@measure.command("link")
@json_option
@plot_option
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
@json_option
@plot_option
@click.option("--quick", is_flag=True, help="One short round, some minutes in place of 80: for a first look.")
@click.option("--rounds", type=click.IntRange(1, 100), help="Rounds, interleaved: 2 if left out.")
@click.option("--gguf", type=click.Path(path_type=Path), help="The model; the default pair's if left out.")
@click.option("--sequences", help="Numbers of sequences, ascending: 1,2,4,8,16 if left out.")
@click.option("--context", type=click.IntRange(1, 1 << 20), help="Tokens of a prompt: 900 if left out.")
@click.option("--tokens", type=click.IntRange(8, 4096), help="New tokens a sequence: 64 if left out.")
@click.option("--profile", type=click.Path(path_type=Path), help="Settings for the tuned worker, made with --tune.")
@click.option("--tune", type=OutputFile(), metavar="FILE", help="Find this host's settings instead.")
def measure_decode(
    json: Path | None,
    plot: Path | None,
    quick: bool,
    rounds: int | None,
    gguf: Path | None,
    sequences: str | None,
    context: int | None,
    tokens: int | None,
    profile: Path | None,
    tune: Path | None,
) -> None:
    """The decode worker against llama.cpp's own programs and the memory's bandwidth, and what disturbs its tokens.

    llama-batched-bench and llama-server are built from the installed version's source first, once, in some minutes.
    With --tune: tries cells, threads, waiting and pages, and writes the best to FILE, for `profile` in [decode].
    """
    from measurements import decode

    decode.stay_on_one_node()
    plan = decode.QUICK if quick else decode.FULL
    setting = decode.setting(
        gguf, sequences or plan.sequences, context or plan.context_tokens, tokens or plan.new_tokens
    )
    if tune is not None:
        from measurements.decode_tune import run

        run(setting, tune, rounds or plan.rounds)
    else:
        decode.run(json, plot, rounds or plan.rounds, setting, str(profile.resolve()) if profile else "")


@measure.command("decode-sizes")
@json_option
@plot_option
@click.option("--shapes", default="1b,8b", show_default=True, help="Like Llama-3.2-1B, -3.1-8B; 360m: SmolLM2-360M.")
@click.option("--sequences", help="Numbers of sequences, ascending; if left out, few, and none of 8b: memory alone.")
@click.option("--context", type=click.IntRange(1, 1 << 20), default=900, show_default=True, help="Tokens of a prompt.")
@click.option("--tokens", type=click.IntRange(8, 4096), default=64, show_default=True, help="New tokens a sequence.")
def measure_decode_sizes(
    json: Path | None, plot: Path | None, shapes: str, sequences: str | None, context: int, tokens: int
) -> None:
    """The decode worker against llama.cpp's own programs, and its memory, on models of several sizes.

    Their weights are random, so that none need be at hand; they are written to TMPDIR and take up to 9 GB there.
    """
    from measurements import decode, decode_sizes

    decode.stay_on_one_node()
    decode_sizes.run(json, plot, shapes, sequences, context, tokens)


@measure.command("memory")
@json_option
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Rounds for each node.")
def measure_memory(json: Path | None, rounds: int) -> None:
    """STREAM's triad and plain reading on each NUMA node, by its own cores: decoding runs at that speed at most."""
    from measurements.memory import run

    run(json, rounds)


@measure.command("crossover")
@json_option
@plot_option
@click.option("--quick", is_flag=True, help="Small requests and few: the embedded pair on two cores in 15 minutes.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for finished runs; a rerun goes on behind them.")
@click.option("--workload", "workloads", multiple=True, help="Only this workload, or 'prompt length'. Repeatable.")
@click.option(
    "--concurrency", "concurrencies", type=click.IntRange(1, 256), multiple=True, help="Only so many requests."
)
@click.option("--rounds", type=click.IntRange(1, 100), help="Rounds, interleaved; 3, or 2 with --quick.")
@click.option("--config", type=click.Path(path_type=Path), help="The cluster file with pair and settings.")
@click.option("--stack", metavar="URL", help="A proxy that runs; without it a stack is brought up on this host.")
@click.option(
    "--replicated", metavar="URL", help='With --stack: a proxy to the same nodes with policy = "round_robin".'
)
def measure_crossover(
    json: Path | None,
    plot: Path | None,
    quick: bool,
    work: Path | None,
    workloads: tuple[str, ...],
    concurrencies: tuple[int, ...],
    rounds: int | None,
    config: Path | None,
    stack: str | None,
    replicated: str | None,
) -> None:
    """Is splitting worth it on this hardware? gpu, cpu, both replicated, split and auto under the same real load.

    Driven by `vllm bench serve`. Says for each workload whether to split, and where splitting starts or stops paying.
    """
    if replicated and not stack:
        raise ConfigError("--replicated is for --stack; a stack of its own has both proxies")
    cluster = load(config) if config else None
    from isthmus.pair import default_pair
    from measurements import crossover, crossover_plan

    plan = crossover_plan.quick() if quick else crossover_plan.full()
    plan = crossover_plan.only(plan, workloads, concurrencies, rounds)
    cluster = cluster or crossover.cluster_for(plan, default_pair())
    where = crossover.Where(cluster, stack, replicated)
    crossover.run(plan, where, work or crossover.work_folder(plan, where), json, plot)


@measure.command("pool")
@json_option
@plot_option
@click.option("--rounds", type=click.IntRange(1, 20), default=3, show_default=True, help="Prompts of 4,033 tokens.")
@click.option(
    "--kills",
    type=click.IntRange(1, 1000),
    help="Instead: kill -9 a worker in mid-stream so often, and compare what answers go on with. Draws nothing.",
)
def measure_pool(json: Path | None, plot: Path | None, rounds: int, kills: int | None) -> None:
    """What the KV pool saves: TTFT of a repeated prompt from each tier, and what conversations compute and send.

    Starts the stack with the default model and a redis-server, and its worker anew for every tier; evictions are
    simulated. Three rounds take about four minutes on two cores, a hundred kills about ten.
    """
    if kills is not None:
        from measurements import pool_kills

        pool_kills.run(json, kills)
        return
    from measurements.pool import run

    run(json, plot, rounds)


@measure.command("advise")
@json_option
@click.option("--plot", type=OutputFile(*PICTURES), help="Draw the curves into this file: .png, .svg or .pdf.")
@click.option("--gpu", default="rtx4070s", show_default=True, help="The prefill node: a shipped profile, or a file.")
@click.option("--cpu", default="dual-e5-2680v4", show_default=True, help="The decode node: the same.")
@click.option("--link", default="10gbe", show_default=True, help="What joins them: the same.")
@click.option("--model", default="llama-3.1-8b-q4", show_default=True, help="The model pair's shape: the same.")
@click.option("--codec", "names", multiple=True, default=("raw", "q8"), show_default=True, help="Codec. Repeatable.")
@click.option("--workload", "workloads", multiple=True, help="Only this workload. Repeatable.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="A number, as gpu.memory_gb_per_s=600.")
@click.option("--results", type=click.Path(path_type=Path), help="Folder of results of `measure` to go by.")
@click.option(
    "--validate",
    is_flag=False,
    flag_value="published",
    metavar="[FILE]",
    help="Only compare the simulation: with published measurements, or with a result of `measure crossover`.",
)
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
    validate: str | None,
) -> None:
    """Simulate gpu, cpu, replicated, split and auto on hardware given by numbers, and say which pays.

    Profiles of hardware and models are TOML or JSON; those that ship name the sources of their numbers. --results takes
    codecs and link from codec.json and link.json, and, with --model smollm2-135m, which they measure, the engines from
    prefill.json and decode.json.
    """
    from measurements import advise, calibrate, profiles

    if validate == "published":
        advise.validate(json)
        return
    if validate is not None:
        advise.validate_crossover(Path(validate), json)
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
        if model == calibrate.MEASURED_MODEL:
            setup = calibrate.with_engines(setup, results)
    advise.run(profiles.changed(setup, assignments), workloads, json, plot)


@measure.command("ledger")
@click.argument("source")
@click.option("--json", type=OutputFile(), help="Write entries, summary and environment to this file.")
@click.option("--plot", type=OutputFile(*PICTURES), help="Draw the waterfall and the medians into this file.")
@click.option("--trace", type=OutputFile(), help="Write a trace for ui.perfetto.dev to this file.")
@click.option(
    "--request", "request_id", help="The request whose waterfall to show; the last one that was split, or answered."
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
@json_option
@plot_option
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


@click.command("fidelity")
@click.argument("hf_dir", type=click.Path(path_type=Path))
@click.argument("gguf", type=click.Path(path_type=Path))
@click.option(
    "--codec",
    "names",
    multiple=True,
    type=click.Choice(tuple(CODECS)),
    default=("raw", "q8"),
    show_default=True,
    help="One to try. Repeatable.",
)
@click.option("--text", type=click.Path(path_type=Path), help="A text file to use instead of our prompts.")
@click.option(
    "--max-kl",
    type=click.FloatRange(0, min_open=True),
    default=0.1,
    show_default=True,
    help="Mean KL to the fp32 model, in nats a token, that is still good enough.",
)
@json_option
def pair_fidelity(
    hf_dir: Path, gguf: Path, names: tuple[str, ...], text: Path | None, max_kl: float, json: Path | None
) -> None:
    """How far decoding GGUF from HF_DIR's KV is from the fp32 model in HF_DIR, and from GGUF's own prefill.

    KL and top-1 of the next token on our prompts, or on your own text; exits 1 if a codec is over --max-kl. The weights
    may differ in precision: native prefill shows what GGUF's own quantization costs. Needs memory for the weights in
    fp32.
    """
    from isthmus.pair import model_name
    from measurements.fidelity import run, too_far

    pair = Pair(name=model_name(gguf), hf_dir=str(hf_dir), gguf=str(gguf))
    complaints = too_far(run(pair, names, text, json, None), max_kl)
    for complaint in complaints:
        click.echo(f"isthmus: {complaint}", err=True)
    sys.exit(1 if complaints else 0)


@measure.command("report")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--html", type=OutputFile(), help="Where to write the HTML; FOLDER/report.html if not given.")
@click.option("--markdown", type=OutputFile(), help="The Markdown; FOLDER/report.md if not given.")
def measure_report(folder: Path, html: Path | None, markdown: Path | None) -> None:
    """One page to publish, from the result files and pictures in FOLDER.

    Says what is wrong with them: mixed commits, NaN, busy machines, missing parts. Averages nothing.
    """
    from measurements.report import run

    run(folder, html, markdown)
