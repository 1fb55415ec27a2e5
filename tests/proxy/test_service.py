"""The proxy as a process of its own: HTTPS, and an end that lets requests finish."""

from __future__ import annotations

import datetime
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.proxy.conftest import make_cluster, serving, wait_until
from tests.proxy.fake_prefill import FakePrefill
from tests.proxy.fake_worker import FakeWorker
from transfer.config import Cluster, dump, load
from transfer.errors import ConfigError

QUESTION = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@contextmanager
def process(cluster: Cluster, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], FakePrefill]]:
    # No engine reads it here.
    gguf = folder / "model.gguf"
    gguf.touch()
    config = folder / "isthmus.toml"
    config.write_bytes(
        dump(msgspec.structs.replace(cluster, pair=msgspec.structs.replace(cluster.pair, gguf=str(gguf))))
    )
    prefill, worker = FakePrefill(), FakeWorker(f"tcp://127.0.0.1:{cluster.decode.control_port}")
    command = [sys.executable, "-m", "isthmus", "proxy", "--config", str(config)]
    try:
        with serving(prefill.app, cluster.prefill.port), subprocess.Popen(command) as proxy:
            try:
                yield proxy, prefill
            finally:
                proxy.kill()
    finally:
        worker.close()


def is_up(http: httpx.Client) -> bool:
    try:
        health = http.get("/health").json()
        return {health[name] for name in ("status", "prefill", "decode")} == {"ok", "up"}
    except (httpx.TransportError, ValueError):
        return False


def refuses(http: httpx.Client) -> bool:
    try:
        http.get("/health/live")
    except httpx.ConnectError:
        return True
    return False


@pytest.fixture
def certificate(tmp_path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert_file.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    unencrypted = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    key_file.write_bytes(key.private_bytes(pem, pkcs8, unencrypted))
    return cert_file, key_file


def test_https(hf_dir, tmp_path, certificate):
    cert, key = certificate
    cluster = make_cluster(hf_dir, tls_cert=str(cert), tls_key=str(key))
    context = ssl.create_default_context(cafile=str(cert))
    url = f"https://localhost:{cluster.proxy.port}"
    with (
        process(cluster, tmp_path),
        httpx.Client(base_url=url, verify=context, trust_env=False, timeout=20) as http,
    ):
        wait_until(lambda: is_up(http), 60)
        assert http.post("/v1/chat/completions", json=QUESTION).status_code == 200


def test_what_is_open_when_the_end_is_asked_for_may_finish(hf_dir, tmp_path):
    cluster = make_cluster(hf_dir)
    url = f"http://127.0.0.1:{cluster.proxy.port}"
    with (
        process(cluster, tmp_path) as (proxy, prefill),
        httpx.Client(base_url=url, trust_env=False, timeout=20) as http,
        ThreadPoolExecutor(1) as pool,
    ):
        wait_until(lambda: is_up(http), 60)
        prefill.script.hang = True
        answer = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=QUESTION, timeout=20, trust_env=False)
        wait_until(lambda: prefill.open)
        proxy.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(http))
        assert not answer.done()
        prefill.script.hang = False
        assert answer.result().json()["choices"][0]["message"]["content"] == "one two three"
        # uvicorn hands the signal on once it has ended in order.
        assert proxy.wait(20) in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("proxy", "says"),
    [
        ({"tls_cert": "cert.pem"}, "both tls_cert and tls_key"),
        ({"tls_cert": "cert.pem", "tls_key": "nothing.pem"}, r"nothing\.pem does not exist - at `\$\.proxy\.tls_key`"),
        ({"api_keys_file": "none"}, r"none does not exist - at `\$\.proxy\.api_keys_file`"),
        ({"requests_per_minute": -1}, r"requests_per_minute"),
    ],
)
def test_a_wrong_key_of_the_file_is_named(hf_dir, tmp_path, certificate, proxy, says):
    cluster = make_cluster(hf_dir)
    cluster = msgspec.structs.replace(cluster, pair=msgspec.structs.replace(cluster.pair, gguf=str(certificate[0])))
    whole = msgspec.to_builtins(cluster) | {"proxy": proxy}
    (tmp_path / "isthmus.toml").write_bytes(msgspec.toml.encode(whole))
    with pytest.raises(ConfigError, match=says):
        load(tmp_path / "isthmus.toml")


def test_files_are_relative_to_the_cluster_file(hf_dir, tmp_path, certificate):
    cluster = make_cluster(hf_dir, tls_cert="cert.pem", tls_key="key.pem")
    cluster = msgspec.structs.replace(cluster, pair=msgspec.structs.replace(cluster.pair, gguf=str(certificate[0])))
    (tmp_path / "isthmus.toml").write_bytes(dump(cluster))
    assert load(tmp_path / "isthmus.toml").proxy.tls_cert == str(certificate[0])


def test_a_client_that_listens_for_events_does_not_hold_up_the_end(hf_dir, tmp_path):
    cluster = make_cluster(hf_dir)
    with (
        process(cluster, tmp_path) as (proxy, _),
        httpx.Client(base_url=f"http://127.0.0.1:{cluster.proxy.port}", trust_env=False, timeout=20) as http,
    ):
        wait_until(lambda: is_up(http), 60)
        with http.stream("GET", "/events") as events:
            lines = events.iter_lines()
            assert next(lines) == "event: nodes"
            proxy.send_signal(signal.SIGTERM)
            # Its stream is ended in order; requests would have `drain_s`, 30 s.
            for _ in lines:
                pass
        assert proxy.wait(20) in (0, -signal.SIGTERM)
