"""Who is let in, how often, and what is kept about it."""

from __future__ import annotations

import hashlib
import stat

import pytest
from click.testing import CliRunner

from isthmus.cli import cli
from proxy import api_keys
from proxy.api_keys import ApiKey, Limits
from proxy.failures import RateLimitError
from proxy.rates import Rates
from tests.proxy.conftest import Stack, make_cluster, running
from tests.proxy.test_failures import SPLIT, error_of
from transfer.errors import ConfigError
from transfer.messages import Reserve

OPEN_PATHS = ("/health", "/health/live", "/health/ready")
A, B = ApiKey(name="a"), ApiKey(name="b")
GUARDED_PATHS = ("/v1/models", "/metrics", "/ledger", "/nodes", "/docs", "/openapi.json", "/nothing")


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "api_keys"


@pytest.fixture(scope="module")
def alice(keys_file) -> str:
    return api_keys.make(keys_file, "alice")


@pytest.fixture(scope="module")
def shared_stack(hf_dir, keys_file, alice):
    with running(make_cluster(hf_dir, api_keys_file=str(keys_file))) as stack:
        stack.http.headers["Authorization"] = f"Bearer {alice}"
        yield stack


def test_only_a_hash_is_kept(keys_file, alice):
    text = keys_file.read_text()
    assert alice not in text
    assert text == f"alice {hashlib.sha256(alice.encode()).hexdigest()}\n"
    assert stat.S_IMODE(keys_file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer wrong", "Basic {}", "{}", "Bearer {}x", "Bearer x{}", "bearer {} {}"]
)
def test_nobody_else_comes_in(stack: Stack, alice, header):
    headers = {"Authorization": header.replace("{}", alice)}
    for path in GUARDED_PATHS:
        response = stack.http.get(path, headers=headers)
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]
    assert error_of(stack.chat(headers), 401)
    assert not stack.prefill.bodies
    assert b'isthmus_requests_total{status="invalid_api_key"}' in stack.gateway.metrics.text()
    for path in OPEN_PATHS:
        assert stack.http.get(path, headers=headers).status_code == 200


def test_a_key_comes_in(stack: Stack, alice):
    assert stack.chat().status_code == 200
    assert stack.chat({"Authorization": f"bearer  {alice}"}).status_code == 200
    assert stack.http.get("/v1/models").status_code == 200


def test_the_environments_key(monkeypatch):
    monkeypatch.setenv(api_keys.ENVIRONMENT, "open sesame")
    keys = api_keys.load("")
    assert keys.holder("open sesame").name == "environment"
    assert keys.holder("open") is None
    monkeypatch.delenv(api_keys.ENVIRONMENT)
    assert not api_keys.load("")


def test_names_and_comments_in_the_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# people\n\n")
    keys = {name: api_keys.make(path, name) for name in ("a", "b")}
    loaded = api_keys.load(str(path))
    assert {name: loaded.holder(key).name for name, key in keys.items()} == {"a": "a", "b": "b"}
    with pytest.raises(ConfigError, match="has a key called 'a'"):
        api_keys.make(path, "a")
    with pytest.raises(ConfigError, match="letters"):
        api_keys.make(path, "a b")


@pytest.mark.parametrize(
    "line",
    [
        "alice",
        "alice abc",
        "alice " + "G" * 64,
        "a b " + "0" * 64,
        *(f"alice {'0' * 64} {limits}" for limits in ("weight", "weight=0", "weight=x", "speed=3", "max_running=-1")),
    ],
)
def test_a_line_that_is_no_key_is_named(tmp_path, line):
    path = tmp_path / "keys"
    path.write_text(f"ok {'0' * 64}\n{line}\n")
    with pytest.raises(ConfigError, match="line 2"):
        api_keys.load(str(path))


def test_a_name_twice_and_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"ok {'0' * 64}\nok {'1' * 64}\n")
    with pytest.raises(ConfigError, match="twice"):
        api_keys.load(str(path))
    with pytest.raises(ConfigError, match=r"proxy\.api_keys_file"):
        api_keys.load(str(tmp_path / "none"))


def test_requests_in_a_minute_by_key():
    rates = Rates(2, 0)
    rates.admit(A)
    rates.admit(A)
    with pytest.raises(RateLimitError, match="2 requests") as caught:
        rates.admit(A)
    assert 1 <= caught.value.retry_after_s <= 60
    rates.admit(B)


def test_tokens_in_a_minute_by_key():
    rates = Rates(0, 100)
    rates.admit(A)
    rates.spend(A, 99)
    rates.admit(A)
    rates.spend(A, 500)
    with pytest.raises(RateLimitError, match="100 tokens"):
        rates.admit(A)
    rates.admit(B)


def test_a_keys_own_limits_count():
    rates = Rates(1, 100)
    freed = ApiKey(name="freed", limits=Limits(requests_per_minute=0, tokens_per_minute=200))
    for _ in range(5):
        rates.admit(freed)
    rates.spend(freed, 150)
    rates.admit(freed)
    rates.spend(freed, 50)
    with pytest.raises(RateLimitError, match="200 tokens"):
        rates.admit(freed)
    bound = ApiKey(name="bound", limits=Limits(requests_per_minute=2))
    rates.admit(bound)
    rates.admit(bound)
    with pytest.raises(RateLimitError, match="2 requests"):
        rates.admit(bound)


def test_limits_and_tenants_are_read_back(tmp_path):
    path = tmp_path / "keys"
    plain = api_keys.make(path, "plain")
    limits = Limits(weight=2.5, requests_per_minute=0, tokens_per_minute=70, max_running=3)
    limited = api_keys.make(path, "limited", limits)
    assert (
        path.read_text()
        .splitlines()[1]
        .endswith(" weight=2.5 requests_per_minute=0 tokens_per_minute=70 max_running=3")
    )
    first, second = (api_keys.load(str(path)).holder(key) for key in (plain, limited))
    assert first.limits == Limits()
    assert second.limits == limits
    # Of its own, the same after a restart, and nothing that the file gives away.
    assert len({first.tenant, second.tenant}) == 2
    assert api_keys.load(str(path)).holder(plain).tenant == first.tenant
    assert first.tenant not in path.read_text()
    assert api_keys.NOBODY.tenant == ""


@pytest.mark.parametrize("shared", [False, True])
def test_prefixes_are_a_tenants_own_unless_shared(hf_dir, tmp_path, shared):
    path = tmp_path / "keys"
    keys = [api_keys.make(path, name) for name in ("a", "b")]
    with running(make_cluster(hf_dir, api_keys_file=str(path), share_prefixes=shared)) as stack:
        for key in keys:
            assert stack.chat({"Authorization": f"Bearer {key}", **SPLIT}).status_code == 200
        tenants = [reserve.tenant for reserve in stack.worker.heard(Reserve)]
        salts = [body["cache_salt"] for body in stack.prefill.bodies]
        if shared:
            assert tenants == ["", ""]
            assert salts == [None, None]
        else:
            assert salts == tenants
            assert len(set(tenants)) == 2
            assert not {"a", "b", ""} & set(tenants)


def test_a_client_that_asks_too_much_is_told_when_to_come_back(hf_dir, tmp_path):
    path = tmp_path / "keys"
    keys = [api_keys.make(path, name) for name in ("a", "b")]
    cluster = make_cluster(hf_dir, api_keys_file=str(path), tokens_per_minute=20)
    with running(cluster) as stack:
        first, second = ({"Authorization": f"Bearer {key}"} for key in keys)
        answer = stack.chat(first)
        assert answer.json()["usage"]["total_tokens"] > 20
        # What it may ask for, and has left with its prompt guessed; requests are not limited.
        left = {name: answer.headers.get(f"x-ratelimit-{name}") for name in ("limit-tokens", "remaining-tokens")}
        assert left["limit-tokens"] == "20"
        assert 0 < int(left["remaining-tokens"]) < 20
        assert answer.headers["x-ratelimit-reset-tokens"].endswith("s")
        assert "x-ratelimit-limit-requests" not in answer.headers
        refused = stack.chat(first)
        assert error_of(refused, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert stack.chat(second).status_code == 200
        stack.assert_idle()


def test_no_prompt_and_no_answer_is_logged(stack: Stack, capfd):
    secret = "xyzzy"
    stack.prefill.script.first_text = "plugh"
    stack.chat(messages=[{"role": "user", "content": secret}])
    stack.complete(prompt=secret, max_tokens=1000)
    stack.chat(messages=[{"role": "user", "content": secret}], temperature=3)
    stack.worker.script.fail_after_texts = 1
    stack.chat(messages=[{"role": "user", "content": secret}])
    written = "".join(capfd.readouterr())
    assert "request closed" in written
    assert secret not in written
    assert "plugh" not in written


def test_the_command_that_makes_keys(tmp_path):
    path = tmp_path / "keys"
    made = CliRunner().invoke(cli, ["api-key", "make", str(path), "alice"])
    assert made.exit_code == 0
    assert api_keys.load(str(path)).holder(made.output.strip()).name == "alice"
    options = ["--weight", "2", "--requests-per-minute", "5", "--tokens-per-minute", "6", "--max-running", "7"]
    made = CliRunner().invoke(cli, ["api-key", "make", str(path), "bob", *options])
    assert api_keys.load(str(path)).holder(made.output.strip()).limits == Limits(
        weight=2, requests_per_minute=5, tokens_per_minute=6, max_running=7
    )
    again = CliRunner().invoke(cli, ["api-key", "make", str(path), "alice"])
    assert isinstance(again.exception, ConfigError)
