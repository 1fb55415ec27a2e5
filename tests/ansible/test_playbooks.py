from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from transfer.config import load

ROOT = Path(__file__).parents[2]
ANSIBLE = ROOT / "ansible"
BIN = ROOT / ".venv-ansible" / "bin"

pytestmark = pytest.mark.skipif(
    not (BIN / "ansible-playbook").exists(), reason="Ansible is not installed: `make ansible` makes .venv-ansible"
)


def ansible(tool: str, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"),
        "ANSIBLE_HOME": str(home),
        "ANSIBLE_NOCOLOR": "1",
        "NO_COLOR": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    return subprocess.run(
        [str(BIN / tool), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.fixture(scope="module")
def pair() -> dict[str, str]:
    from isthmus.pair import default_pair

    made = default_pair()
    return {"isthmus_pair_hf_dir": made.hf_dir, "isthmus_pair_gguf": made.gguf}


ONE_EACH = {"gpu_prefill": ["gpu"], "cpu_decode": ["xeon"], "proxy": ["xeon"]}
TWO_XEONS = {"gpu_prefill": ["gpu"], "cpu_decode": ["xeon", "xeon2"], "proxy": ["xeon2"], "monitoring": ["gpu"]}
TWO_OF_BOTH = {
    "gpu_prefill": ["gpu", "gpu.2"],
    "cpu_decode": ["xeon", "xeon2"],
    "proxy": ["xeon"],
    "monitoring": ["xeon"],
}


def play(folder: Path, playbook: Path, groups: dict[str, list[str]], **variables: Any) -> str:
    """Everything that a playbook says with an inventory whose hosts are this machine; "" if it goes through."""
    inventory = {
        "all": {
            "vars": {
                "ansible_connection": "local",
                "isthmus_pair_name": "SmolLM2",
                "isthmus_prefill_device": "cpu",
                "isthmus_num_cells": 4096,
                "isthmus_landing_mib": 64,
                "isthmus_pool_mib": 64,
                "isthmus_command": str(ROOT / ".venv" / "bin" / "isthmus"),
                "isthmus_keys_dir": str(folder / "keys"),
            }
            | variables,
            "children": {group: {"hosts": {host: {} for host in hosts}} for group, hosts in groups.items()},
        }
    }
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory))
    done = ansible("ansible-playbook", "-i", str(folder / "hosts.yml"), str(playbook), home=folder)
    return "" if done.returncode == 0 else re.sub(r"\s+", " ", done.stdout + done.stderr)


def preflight(folder: Path, groups: dict[str, list[str]] = ONE_EACH, **variables: Any) -> str:
    return play(folder, ANSIBLE / "preflight.yml", groups, **variables)


# Playbooks that do not parse are among the linter's findings.
def test_ansible_lint_finds_nothing(tmp_path: Path) -> None:
    done = ansible("ansible-lint", "--offline", "-q", "--profile", "production", str(ANSIBLE), home=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_default_is_specified() -> None:
    for defaults in ANSIBLE.glob("roles/*/defaults/main.yml"):
        specs = yaml.safe_load((defaults.parents[1] / "meta" / "argument_specs.yml").read_text())["argument_specs"]
        assert yaml.safe_load(defaults.read_text()).keys() == specs["main"]["options"].keys(), defaults


def test_the_codecs_of_the_inventory_are_ours() -> None:
    from transfer.codecs import CODECS

    specs = yaml.safe_load((ANSIBLE / "roles/isthmus/meta/argument_specs.yml").read_text())
    assert set(specs["argument_specs"]["main"]["options"]["isthmus_codec"]["choices"]) == {"auto", *CODECS}


@pytest.mark.parametrize("groups", [TWO_XEONS, TWO_OF_BOTH])
def test_a_right_inventory_is_not_refused(pair: dict[str, str], groups: dict[str, list[str]], tmp_path: Path) -> None:
    assert preflight(tmp_path, groups, **pair) == ""


def test_cluster_files_of_two_decode_hosts_are_what_the_nodes_read(pair: dict[str, str], tmp_path: Path) -> None:
    state = tmp_path / "state" / "pair"
    (state / "hf").mkdir(parents=True)
    (state / "model.gguf").touch()
    roles = str(ANSIBLE / "roles")
    template = {
        "src": f"{roles}/base/templates/isthmus.toml.j2",
        "dest": "{{ inventory_dir }}/{{ inventory_hostname }}.toml",
    }
    files = {
        "src": f"{roles}/firewall/templates/isthmus.nft.j2",
        "dest": "{{ inventory_dir }}/{{ inventory_hostname }}.nft",
    }
    tasks = [
        {"ansible.builtin.import_role": {"name": "isthmus"}},
        {"ansible.builtin.include_vars": f"{roles}/firewall/defaults/main.yml"},
        {"ansible.builtin.template": template, "vars": {"base_node": "decode", "base_numa": 1, "base_port_offset": 10}},
        {"ansible.builtin.template": files},
    ]
    playbook = tmp_path / "write.yml"
    playbook.write_text(yaml.safe_dump([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
    extra = {"isthmus_state_dir": str(tmp_path / "state"), "isthmus_extra": {"link": {"frame_mib": 8}}}
    assert play(tmp_path, playbook, TWO_XEONS, **pair, **extra) == ""

    read = {host: load(tmp_path / f"{host}.toml") for host in ("gpu", "xeon", "xeon2")}
    assert [read[host].decode.advertise_host for host in read] == ["xeon", "xeon", "xeon2"]
    assert {each.proxy.advertise_host for each in read.values()} == {"xeon2"}
    assert {each.prefill.host for each in read.values()} == {"gpu"}
    assert {(each.decode.control_port, each.decode.kv_port, each.decode.numa) for each in read.values()} == {
        (8112, 8113, 1)
    }
    assert {each.link.frame_mib for each in read.values()} == {8}
    rules = {host: (tmp_path / f"{host}.nft").read_text() for host in read}
    assert "ip saddr { xeon, xeon2 } tcp dport 8105 accept" in rules["xeon2"]
    assert "tcp dport 8105" not in rules["xeon"]
    assert "ip saddr { gpu } tcp dport { 8103, 8113" in rules["xeon"]
    assert "ip saddr { xeon2 } tcp dport 8101 accept" in rules["gpu"]


def test_two_prefill_hosts_are_known_to_all_and_each_has_its_own_key(pair: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "state/pair/hf").mkdir(parents=True)
    (tmp_path / "state/pair/model.gguf").touch()
    roles = str(ANSIBLE / "roles")
    written = {"base/templates/isthmus.toml": "toml", "firewall/templates/isthmus.nft": "nft"}
    written |= {"monitoring/templates/prometheus.yml": "yml"}
    defaults = [{"ansible.builtin.include_vars": f"{roles}/{role}/defaults/main.yml"} for role in ("firewall", "keys")]
    defaults += [{"ansible.builtin.include_vars": f"{roles}/monitoring/defaults/main.yml"}]
    defaults += [{"ansible.builtin.set_fact": {"monitoring_dcgm_port": 9400}}]
    make = yaml.safe_load((ANSIBLE / "roles/keys/tasks/main.yml").read_text())[0]
    templates = [
        {
            "ansible.builtin.template": {
                "src": f"{roles}/{source}.j2",
                "dest": f"{{{{ inventory_dir }}}}/{{{{ inventory_hostname }}}}.{ending}",
            },
            "vars": {"base_node": "prefill", "base_numa": "off", "base_port_offset": 0},
        }
        for source, ending in written.items()
    ]
    keys = {
        "content": "{{ [keys_own, keys_known] | to_json }}",
        "dest": "{{ inventory_dir }}/{{ inventory_hostname }}.keys",
    }
    tasks = [
        {"ansible.builtin.import_role": {"name": "isthmus"}},
        *defaults,
        make,
        *templates,
        {"ansible.builtin.copy": keys},
    ]
    playbook = tmp_path / "write.yml"
    playbook.write_text(yaml.safe_dump([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
    assert play(tmp_path, playbook, TWO_OF_BOTH, **pair, isthmus_state_dir=str(tmp_path / "state")) == ""

    read = {host: load(tmp_path / f"{host}.toml") for host in ("gpu", "gpu.2", "xeon", "xeon2")}
    assert {each.prefill.nodes for each in read.values()} == {("gpu:8101", "gpu.2:8101")}
    assert [each.prefill.host for each in read.values()] == ["gpu", "gpu.2", "gpu", "gpu"]
    rules = {host: (tmp_path / f"{host}.nft").read_text() for host in read}
    for xeon in ("xeon", "xeon2"):
        assert "ip saddr { gpu, gpu.2 } tcp dport { 8103, 8113" in rules[xeon]
    for gpu in ("gpu", "gpu.2"):
        assert "ip saddr { xeon } tcp dport 8101 accept" in rules[gpu]
    jobs = {job["job_name"]: job for job in yaml.safe_load((tmp_path / "xeon.yml").read_text())["scrape_configs"]}
    targets = {name: job["static_configs"][0]["targets"] for name, job in jobs.items()}
    assert targets["vllm"] == ["gpu:8101", "gpu.2:8101"]
    assert targets["dcgm"] == ["gpu:9400", "gpu.2:9400"]
    assert len(targets["node"]) == 4
    own, known = zip(*(json.loads((tmp_path / f"{host}.keys").read_text()) for host in read), strict=True)
    assert own == (["prefill"], ["prefill-gpu-2"], ["decode", "proxy"], ["decode"])
    assert known[:2] == (["decode", "prefill"], ["decode", "prefill-gpu-2"])
    assert set(known[2]) == set(known[3]) == {"decode", "proxy", "prefill", "prefill-gpu-2"}
    made = {path.name for path in (tmp_path / "keys").glob("*")}
    assert {f"{name}{ending}" for name in known[2] for ending in (".key", ".key_secret")} == made


def test_each_play_over_several_prefill_hosts_goes_one_by_one_where_it_must() -> None:
    upgrade = yaml.safe_load((ANSIBLE / "upgrade.yml").read_text())
    assert [each["serial"] for each in upgrade if each["hosts"] in ("gpu_prefill", "cpu_decode")] == [1, 1]
    measure = yaml.safe_load((ANSIBLE / "measure.yml").read_text())
    (link,) = (each for each in measure if "link" in each["name"])
    assert (link["hosts"], link["serial"]) == ("gpu_prefill", 1)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"isthmus_codec": "gzip"}, "isthmus_codec must be one of"),
        ({"isthmus_codec": "rows_q8_0"}, "does not fit isthmus_cell_type f16; choose auto"),
        ({"isthmus_pair_gguf": "/nowhere.gguf"}, "isthmus_pair_gguf is /nowhere.gguf, which does not exist"),
        ({"isthmus_num_cells": 2**30}, "lower isthmus_num_cells"),
        ({"cpu_decode_numa_nodes": [77]}, "cpu_decode_numa_nodes names [77]"),
        ({"isthmus_num_cells": "many"}, "isthmus_num_cells"),
    ],
)
def test_a_wrong_value_is_refused(
    pair: dict[str, str], variables: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    assert sentence in preflight(tmp_path, **(pair | variables))


def test_a_missing_pair_is_refused(tmp_path: Path) -> None:
    assert "isthmus_pair_hf_dir" in preflight(tmp_path)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have a GPU")
def test_a_prefill_host_without_a_gpu_is_refused(pair: dict[str, str], tmp_path: Path) -> None:
    said = preflight(tmp_path, **pair, isthmus_prefill_device="cuda")
    assert "finds no GPU there; install NVIDIA's driver, or set isthmus_prefill_device to cpu" in said


def test_halves_of_different_models_are_refused(pair: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair["isthmus_pair_hf_dir"], other)
    config = (other / "config.json").read_text()
    changed = re.sub(r'"rope_theta": *[0-9.]+', '"rope_theta": 12345.0', config)
    assert changed != config
    (other / "config.json").write_text(changed)
    said = preflight(tmp_path, **(pair | {"isthmus_pair_hf_dir": str(other)}))
    assert "isthmus_pair_hf_dir and isthmus_pair_gguf are not one model" in said


def test_a_lost_secret_is_refused(pair: dict[str, str], tmp_path: Path) -> None:
    from transfer import keys

    keys.make(tmp_path / "keys")
    (tmp_path / "keys" / "decode.key_secret").unlink()
    assert "decode.key_secret is missing" in preflight(tmp_path, **pair)


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ({"gpu_prefill": [], "cpu_decode": ["xeon"], "proxy": ["xeon"]}, "gpu_prefill is empty; put the hosts there"),
        ({"gpu_prefill": ["one"], "cpu_decode": ["xeon"], "proxy": ["xeon", "one"]}, "put exactly one there"),
    ],
)
def test_groups_of_a_wrong_size_are_refused(
    pair: dict[str, str], groups: dict[str, list[str]], sentence: str, tmp_path: Path
) -> None:
    assert sentence in preflight(tmp_path, groups, **pair)
