import re

import msgspec
import pytest

from transfer import config
from transfer.errors import ConfigError

MINIMAL = """
[pair]
name = "tiny"
hf_dir = "hf"
gguf = "tiny.gguf"
"""


@pytest.fixture
def write(tmp_path):
    """Writes a cluster file beside a model pair that exists."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "tiny.gguf").touch()

    def write(text):
        path = tmp_path / "cluster.toml"
        path.write_text(text)
        return path

    return write


def test_a_minimal_file_has_defaults_and_absolute_paths(write, tmp_path):
    cluster = config.load(write(MINIMAL))
    assert cluster.pair.hf_dir == str(tmp_path / "hf")
    assert cluster.pair.gguf == str(tmp_path / "tiny.gguf")
    assert cluster.prefill == config.Prefill()
    assert cluster.link.codec == "raw"


def test_relative_paths_do_not_depend_on_the_current_folder(write, tmp_path, monkeypatch):
    path = write(MINIMAL)
    monkeypatch.chdir("/")
    assert config.load(path).pair.gguf == str(tmp_path / "tiny.gguf")


def test_a_dumped_cluster_loads_equal(write, tmp_path):
    cluster = config.load(write(MINIMAL + '[link]\ncodec = "q8"\nchunk_tokens = 64\n[prefill]\nextra_args = ["--x"]'))
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "copy.toml"
    copy.write_bytes(config.dump(cluster))
    assert config.load(copy) == cluster


def test_a_cluster_is_frozen(write):
    cluster = config.load(write(MINIMAL))
    with pytest.raises(AttributeError):
        cluster.link.codec = "lz4"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "pair"),
        (MINIMAL + "[decode]\nport = 1", "port"),
        (MINIMAL + "[ledger]\nx = 1", "ledger"),
        (MINIMAL + "[decode]\nkv_port = -1", "$.decode.kv_port"),
        (MINIMAL + "[decode]\nkv_port = 65536", "$.decode.kv_port"),
        (MINIMAL + '[decode]\nkv_port = "8103"', "$.decode.kv_port"),
        (MINIMAL + "[decode]\nmax_sequences = 256", "$.decode.max_sequences"),
        (MINIMAL + '[decode]\ncell_type = "f32"', "$.decode.cell_type"),
        (MINIMAL + "[proxy]\nmax_running = 0", "$.proxy.max_running"),
        (MINIMAL + '[link]\ncodec = "snappy"', "$.link.codec"),
        (MINIMAL + "[link]\nframe_mib = 65", "$.link.frame_mib"),
        (MINIMAL + "[link]\ntransfer_deadline_s = 0.0", "$.link.transfer_deadline_s"),
        (MINIMAL + "[prefill]\ngpu_memory_utilization = 1.5", "$.prefill.gpu_memory_utilization"),
        (MINIMAL.replace("tiny.gguf", "absent.gguf"), "$.pair.gguf"),
        (MINIMAL.replace('"hf"', '"absent"'), "$.pair.hf_dir"),
        (MINIMAL.replace('"hf"', '"tiny.gguf"'), "$.pair.hf_dir"),
        (MINIMAL.replace('"tiny.gguf"', '"hf"'), "$.pair.gguf"),
    ],
)
def test_a_wrong_key_is_named_with_its_file(write, text, key):
    path = write(text)
    with pytest.raises(ConfigError, match=re.escape(key)) as caught:
        config.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"[pair\n", b'[pair]\nname = "a"\nname = "b"', b"\xff\xfe", b"pair = 1"])
def test_a_file_that_is_not_our_toml_is_refused(write, content):
    path = write("")
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        config.load(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        config.load(tmp_path / "cluster.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        config.load(tmp_path)


def test_ports_of_one_host_do_not_collide_by_default():
    decode, proxy, prefill = config.Decode(), config.Proxy(), config.Prefill()
    assert len({decode.control_port, decode.kv_port, proxy.port, prefill.port}) == 4
    assert msgspec.convert(msgspec.to_builtins(decode), config.Decode) == decode
