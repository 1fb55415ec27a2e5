import re
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

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
    assert cluster.link.codec == "auto"


@pytest.mark.parametrize("cells", ["f16", "bf16", "q8_0", "k8v4", "q4_0"])
def test_a_codec_need_not_be_named_for_any_cells(write, cells):
    assert config.load(write(MINIMAL + f'[decode]\ncell_type = "{cells}"')).link.codec == "auto"


def test_relative_paths_do_not_depend_on_the_current_folder(write, tmp_path, monkeypatch):
    path = write(MINIMAL)
    monkeypatch.chdir("/")
    assert config.load(path).pair.gguf == str(tmp_path / "tiny.gguf")


def test_the_key_folder_is_taken_from_the_files_folder(write, tmp_path):
    cluster = config.load(write(MINIMAL + '[keys]\ndir = "secrets"'))
    assert cluster.keys.dir == str(tmp_path / "secrets")
    assert config.keys_folder(cluster) == tmp_path / "secrets"
    assert config.load(write(MINIMAL + '[keys]\ndir = "/etc/isthmus"')).keys.dir == "/etc/isthmus"


@pytest.mark.parametrize("seal", ["aes-gcm", "integrity"])
def test_a_seal_without_keys_is_refused_with_both_fixes(write, seal):
    cluster = config.load(write(MINIMAL + f'[link]\nseal = "{seal}"'))
    with pytest.raises(ConfigError, match=rf'{seal}.*isthmus keys make.*\[keys\].*seal = "none"'):
        config.keys_folder(cluster)


def test_frames_are_sealed_unless_the_file_says_otherwise(write):
    assert config.load(write(MINIMAL)).link.seal == "aes-gcm"


@pytest.mark.parametrize(("folder", "control"), [("", "open"), ("/k", "CURVE")])
def test_no_seal_is_warned_of(write, folder, control):
    cluster = config.load(write(MINIMAL + f'[link]\nseal = "none"\n[keys]\ndir = "{folder}"'))
    with capture_logs() as logs:
        assert config.keys_folder(cluster) == (Path(folder) if folder else None)
    assert [(line["log_level"], line["control"]) for line in logs] == [("warning", control)]
    assert "unprotected" in logs[0]["event"]


def test_where_the_prefill_nodes_are(write):
    assert config.load(write(MINIMAL)).prefill.addresses == ("127.0.0.1:8101",)
    assert config.load(write(MINIMAL + '[prefill]\nhost = "gpu"\nport = 1')).prefill.addresses == ("gpu:1",)
    several = '[prefill]\nhost = "gpu-1"\nnodes = ["gpu-1:8101", "10.10.0.3:8101", "[fe80::1]:8101"]'
    assert config.load(write(MINIMAL + several)).prefill.addresses == ("gpu-1:8101", "10.10.0.3:8101", "[fe80::1]:8101")


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (
            ["gpu"],
            r"line 7: 'gpu' is no address of a prefill node; write it as \"HOST:PORT\" - at `\$.prefill.nodes\[0\]`",
        ),
        (["gpu:0"], "'gpu:0' is no address"),
        (["gpu:65536"], "'gpu:65536' is no address"),
        (["http://gpu:1"], "is no address"),
        (
            ["a:1", "b:1", "a:1"],
            r"line 7: a:1 is listed twice; name each prefill node once - at `\$.prefill.nodes\[2\]`",
        ),
        ([f"a:{port}" for port in range(1, 66)], "65 prefill nodes are more than the 64"),
        ([1], "prefill.nodes"),
    ],
)
def test_wrong_prefill_nodes_are_named(write, nodes, said):
    with pytest.raises(ConfigError, match=said):
        config.load(write(MINIMAL + f"[prefill]\nnodes = {msgspec.json.encode(nodes).decode()}"))


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
        (MINIMAL + '[decode]\ncell_type = "q8_0"\n[link]\ncodec = "raw"', "use rows_q8_0 - at `$.link.codec`"),
        (MINIMAL + '[link]\ncodec = "rows_k8v4"', "codec rows_k8v4 cannot land in f16 cells"),
        (MINIMAL + '[link]\nseal = "rot13"', "$.link.seal"),
        (MINIMAL + "[keys]\nfolder = 1", "folder"),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[proxy]\npolicy = "fastest"',
            "line 6: Invalid enum value 'fastest' - at `$.proxy.policy`;"
            " allowed: min_ttft, min_e2e, max_goodput, round_robin",
        ),
        ('# none\n[link]\n\n seal="rot13"', "line 8: Invalid enum value 'rot13' - at `$.link.seal`; allowed: none,"),
        ('[decode]\nnuma = "one"', "at `$.decode.numa`; allowed: auto, off, or a number"),
        ('[decode]\nspeculate = "on"', "at `$.decode.speculate`; allowed: auto, off, always"),
        ('[decode]\ncell_type = "f32"', "allowed: f16, bf16,"),
        ("[proxy]\n[decode]\nnum_cells = 0", "line 7: Expected `int` >= 1 - at `$.decode.num_cells`"),
        (
            "[decode]\nthreads = 1\n[proxy]\nthreads = 1",
            "line 8: Object contains unknown field `threads` - at `$.proxy`",
        ),
        ("[nodes]\nname = 1", "line 5: Object contains unknown field `nodes`"),
        ("[prefill]\nextra_args = [\n1]", "line 6: Expected `str`, got `int` - at `$.prefill.extra_args[0]`"),
        ("[proxy]\nport = \n", "Invalid value (at line 6"),
        ("proxy = 1", "unknown field `proxy`"),
    ],
)
def test_a_message_names_the_line_and_what_is_allowed(write, text, message):
    path = write(MINIMAL.lstrip() + text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
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


def test_the_example_file_shows_every_key_with_its_default():
    shown = msgspec.toml.decode((Path(__file__).parents[2] / "isthmus.example.toml").read_bytes())
    defaults = config.Cluster(pair=msgspec.convert(shown["pair"], config.Pair))
    assert shown == msgspec.toml.decode(config.dump(defaults))


def test_ports_of_one_host_do_not_collide_by_default():
    decode, proxy, prefill = config.Decode(), config.Proxy(), config.Prefill()
    ports = {decode.control_port, decode.kv_port, decode.kv_control_port, proxy.port, proxy.registry_port, prefill.port}
    assert len(ports) == 6
    assert msgspec.convert(msgspec.to_builtins(decode), config.Decode) == decode
