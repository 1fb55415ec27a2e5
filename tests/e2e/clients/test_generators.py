"""Load generators and an evaluation harness, as people run them, against the real engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.clients.found import environment, program
from tests.e2e.conftest import Running

pytestmark = pytest.mark.engines

TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{{target}}}}}"
{more}
"""
# `vllm bench serve`; the command itself asks for a package called vllm, which the build for CPUs is not.
BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
CHOICES = 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]'
GENERATED = 'generation_kwargs: {until: ["."], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]'
ROWS = [
    {"question": "The sky is", "choices": [" blue", " xqz vvw"], "answer": 0},
    {"question": "One, two,", "choices": [" zebra hat", " three"], "answer": 1},
    {"question": "Cats and", "choices": [" dogs", " perpendicular"], "answer": 0},
]


def run(command: list[str], home: Path) -> str:
    done = subprocess.run(
        command, env=environment(home), capture_output=True, text=True, timeout=240, check=False, cwd=home
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_vllm_bench_serve(stack: Running, tmp_path: Path):
    command = [sys.executable, "-P", "-c", BENCH_SERVE, "--backend", "openai-chat"]
    command += ["--base-url", stack.proxy_url, "--endpoint", "/v1/chat/completions", "--dataset-name", "random"]
    command += ["--random-input-len", "40", "--random-output-len", "6", "--num-prompts", "6", "--max-concurrency", "3"]
    command += ["--model", stack.cluster.pair.name, "--tokenizer", stack.cluster.pair.hf_dir, "--temperature", "0"]
    command += ["--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "found.json"]
    run(command, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["completed"], found["failed"]) == (6, 0)
    assert found["output_lens"] == [6] * 6
    assert all(ttft > 0 for ttft in found["ttfts"])


def lm_eval(stack: Running, home: Path, model: str, settings: str, kind: str, *more: str) -> dict[str, Any]:
    """What the harness finds on a task of three rows, asked for like ``kind``."""
    command = [str(program("lm-eval", "lm_eval", "'lm-eval[api]' transformers"))]
    rows = home / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fields = CHOICES if kind == "multiple_choice" else GENERATED
    (home / "tiny.yaml").write_text(TASK.format(rows=rows, kind=kind, target="answer", more=fields))
    settings = f"model={stack.cluster.pair.name},base_url={stack.proxy_url}{settings},num_concurrent=2,max_retries=1"
    command += ["--model", model, "--model_args", settings, "--tasks", "tiny", *more]
    command += ["--include_path", str(home), "--output_path", str(home / "out"), "--log_samples"]
    run(command, home)
    (results,) = (home / "out").rglob("results_*.json")
    found: dict[str, Any] = json.loads(results.read_text())["results"]["tiny"]
    return found


@pytest.mark.parametrize("tokenizer", ["text", "ids", "remote"])
def test_lm_eval_scores_prompts(stack: Running, tmp_path: Path, tokenizer: str):
    settings = f"/v1/completions,tokenizer={stack.cluster.pair.hf_dir},tokenizer_backend=huggingface"
    settings += f",tokenized_requests={tokenizer == 'ids'}"
    if tokenizer == "remote":
        # It knows nothing of the model but its name: tokens are counted here.
        settings = "/v1/completions"
    assert lm_eval(stack, tmp_path, "local-completions", settings, "multiple_choice")["acc,none"] == 1.0


@pytest.mark.parametrize("kind", ["completions", "chat-completions"])
def test_lm_eval_reads_answers(stack: Running, tmp_path: Path, kind: str):
    settings, more = f"/v1/{kind.replace('-', '/')}", []
    if kind == "completions":
        settings += f",tokenizer={stack.cluster.pair.hf_dir},tokenizer_backend=huggingface,tokenized_requests=False"
    else:
        more = ["--apply_chat_template"]
    found = lm_eval(stack, tmp_path, f"local-{kind}", settings, "generate_until", *more)
    assert 0.0 <= found["exact_match,none"] <= 1.0
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(answers) == len(ROWS)
    assert all(answers)


def test_guidellm(stack: Running, tmp_path: Path):
    model, hf_dir = stack.cluster.pair.name, stack.cluster.pair.hf_dir
    command = [str(program("guidellm", "guidellm", "guidellm")), "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={stack.proxy_url},model={model}"]
    command += ["--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={hf_dir}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=40,output_tokens=6"]
    command += ["--output", f"kind=json,path={tmp_path / 'found.json'}"]
    run(command, tmp_path)
    (benchmark,) = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    made = benchmark["requests"]
    assert len(made["successful"]) >= 6
    assert not made["errored"]
