from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import msgspec
import pytest

from gpu_prefill import service
from gpu_prefill.geometry import read_geometry
from tests.gpu_prefill.checkpoints import LLAMA, write_model
from transfer import keys
from transfer.config import Cluster, Keys, Link, Pair, Prefill
from transfer.errors import ConfigError
from transfer.geometry import KVGeometry

UNSEALED = Link(seal="none")


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(pair=Pair(name="tiny", hf_dir=str(write_model(tmp_path / "hf", LLAMA)), gguf=""), link=UNSEALED)


def with_prefill(cluster: Cluster, prefill: Prefill) -> Cluster:
    return msgspec.structs.replace(cluster, prefill=prefill)


@pytest.fixture(params=["cpu", "gpu"])
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pretend that this build of vLLM is installed."""

    def version(_name: str) -> str:
        if request.param == "gpu":
            raise PackageNotFoundError
        return "0.32.0"

    monkeypatch.setattr(service, "find_spec", lambda _name: object())
    monkeypatch.setattr(service, "version", version)
    return str(request.param)


def option(argv: list[str], name: str) -> str:
    return next(word.partition("=")[2] for word in argv if word.startswith(f"{name}="))


def test_starts_vllms_own_server_with_the_connector(cluster: Cluster, build: str) -> None:
    argv, environment = service.command(cluster)
    assert argv[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert option(argv, "--served-model-name") == "tiny"
    assert option(argv, "--max-model-len") == "4096"
    transfer = msgspec.json.decode(option(argv, "--kv-transfer-config"))
    extra = transfer.pop("kv_connector_extra_config")
    assert transfer == {
        "kv_connector": "IsthmusConnector",
        "kv_connector_module_path": "gpu_prefill.connector",
        "kv_role": "kv_producer",
    }
    assert msgspec.convert(extra["geometry"], KVGeometry) == read_geometry(Path(cluster.pair.hf_dir))
    assert extra["rope_order"] == "half"
    assert (extra["sender_bytes"], extra["frame_bytes"]) == (1 << 30, 4 << 20)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PATH"]
    on_cpu = build == "cpu"
    assert ("--enforce-eager" in argv) == on_cpu
    assert any(word.startswith("--gpu-memory-utilization") for word in argv) != on_cpu
    assert environment.get("VLLM_CPU_KVCACHE_SPACE") == ("1" if on_cpu else None)


@pytest.mark.usefixtures("build")
def test_the_file_decides_about_prefix_caching_and_has_the_last_word(cluster: Cluster) -> None:
    argv, _ = service.command(cluster)
    assert "--enable-prefix-caching" in argv
    argv, _ = service.command(with_prefill(cluster, Prefill(prefix_caching=False, extra_args=("--no-enforce-eager",))))
    assert "--no-enable-prefix-caching" in argv
    assert argv[-1] == "--no-enforce-eager"


@pytest.mark.usefixtures("build")
def test_the_connector_learns_where_its_keys_are_and_no_secret(cluster: Cluster, tmp_path: Path) -> None:
    sealed = msgspec.structs.replace(cluster, link=Link(), keys=Keys(dir=str(tmp_path / "keys")))
    with pytest.raises(ConfigError, match=r"prefill\.key_secret"):
        service.command(sealed)
    keys.make(tmp_path / "keys")
    argv, environment = service.command(sealed)
    extra = msgspec.json.decode(option(argv, "--kv-transfer-config"))["kv_connector_extra_config"]
    assert extra["keys_dir"] == str(tmp_path / "keys")
    secret = keys.client(tmp_path / "keys", "prefill").secret.decode()
    assert not any(secret in word for word in (*argv, *environment.values()))


@pytest.mark.usefixtures("build")
@pytest.mark.usefixtures("build")
def test_a_model_that_cannot_be_split_is_refused_unless_nothing_is_exported(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "rope_theta": 150000.0}
    published = LLAMA | {
        "architectures": ["GptOssForCausalLM"],
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": yarn,
    }
    hf_dir = write_model(tmp_path / "gpt-oss", published)
    cluster = Cluster(pair=Pair(name="gpt-oss", hf_dir=str(hf_dir), gguf=""), link=UNSEALED)
    with pytest.raises(ConfigError, match=r"truncate = false .* \[prefill\] export = false"):
        service.command(cluster)
    argv, _ = service.command(with_prefill(cluster, Prefill(export=False)))
    assert not any("kv" in word for word in argv)


def test_an_operators_openmp_policy_wins(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert service.command(cluster)[1]["OMP_WAIT_POLICY"] == "active"


@pytest.mark.usefixtures("build")
def test_refuses_steps_too_small_for_vllm(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"128 tokens or more, not 64 - at `\$\.prefill\.max_step_tokens`"):
        service.command(with_prefill(cluster, Prefill(max_step_tokens=64)))


def test_names_the_extra_to_install(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"install isthmus\[prefill\].*isthmus\[prefill-cpu\]"):
        service.run(cluster)
