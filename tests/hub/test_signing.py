"""`hub sign` and `hub verify --key`, with real keys and the real library; its own CLI must agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hub.cli import main
from hub.store import Store

pytest.importorskip("model_signing", reason="the extra `sign` is not installed")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


def pair(directory: Path, name: str, key=None) -> tuple[Path, Path]:
    key = key or ec.generate_private_key(ec.SECP256R1())
    plain = serialization.NoEncryption()
    private, public = directory / f"{name}.pem", directory / f"{name}.pub.pem"
    pkcs8 = serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, plain))
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, spki))
    private.chmod(0o600)
    return private, public


@pytest.fixture
def signed(hub_home: Path, packed, tmp_path: Path) -> tuple[Path, Path]:
    """HUB_HOME holds acme/tone, signed; gives the key pair."""
    Store(hub_home).put(packed()[0])
    keys = pair(tmp_path, "author")
    result = run("sign", "acme/tone", "--key", keys[0])
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    return keys


def test_a_signature_holds_for_its_key_alone(signed, tmp_path: Path) -> None:
    assert run("verify", "acme/tone", "--key", signed[1]).exit_code == 0
    report = json.loads(run("verify", "acme/tone", "--key", signed[1], "--json").stdout)
    assert report["ok"]
    other = pair(tmp_path, "other")
    result = run("verify", "acme/tone", "--key", other[1])
    assert result.exit_code == 1
    assert "no signature by" in result.stderr
    result = run("verify", "acme/tone", "--key", other[1], "--signature", report["signed"]["signature"])
    assert result.exit_code == 1
    assert "Key mismatch" in result.stderr


def test_a_detached_signature_and_the_library_s_own_verb(signed, tmp_path: Path) -> None:
    place, out = tmp_path / "tone.sig", tmp_path / "out"
    assert run("sign", "acme/tone", "--key", signed[0], "--out", place).exit_code == 0
    assert run("pull", "acme/tone", "--out", out).exit_code == 0
    stock = ["model_signing", "verify", "key", str(out), "--signature", str(place), "--public_key", str(signed[1])]
    done = subprocess.run([sys.executable, "-m", *stock], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert run("verify", out, "--key", signed[1], "--signature", place).exit_code == 0


def test_a_signature_travels_and_holds_in_another_store(signed, tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "remote"
    assert run("push", "acme/tone", "--to", place).exit_code == 0
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "another"))
    result = run("pull", "acme/tone", "--from", place)
    assert "a signature came along; `hub verify acme/tone@1.0.0 --key" in result.stderr
    result = run("verify", "acme/tone", "--key", signed[1])
    assert result.exit_code == 0, result.output
    other = pair(tmp_path, "other")
    result = run("verify", "acme/tone", "--key", other[1])
    assert result.exit_code == 1
    assert "it is signed by" in result.stderr
    # A second author signs what was pulled, and sends that back.
    assert run("sign", "acme/tone", "--key", other[0]).exit_code == 0
    assert run("push", "acme/tone", "--to", place).exit_code == 0
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "third"))
    assert "2 signatures came along" in run("pull", "acme/tone", "--from", place).stderr
    for public in (signed[1], other[1]):
        assert run("verify", "acme/tone", "--key", public).exit_code == 0


def test_a_signature_that_was_changed_on_the_way(signed, hub_home: Path, tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "remote"
    assert run("push", "acme/tone", "--to", place).exit_code == 0
    [there] = (place / "signatures").glob("*/*.json")
    there.write_text(there.read_text().replace("A", "B"))
    monkeypatch.setenv("HUB_HOME", str(tmp_path / "another"))
    assert run("pull", "acme/tone", "--from", place).exit_code == 0
    result = run("verify", "acme/tone", "--key", signed[1])
    assert result.exit_code == 1
    assert "error:" in result.stderr


def test_other_bytes_and_other_artifacts_do_not_pass(signed, packed, tmp_path: Path) -> None:
    place = tmp_path / "tone.sig"
    assert run("sign", "acme/tone", "--key", signed[0], "--out", place).exit_code == 0
    directory, _ = packed("acme/tone@1.1.0", seed=1)
    result = run("verify", directory, "--key", signed[1], "--signature", place)
    assert result.exit_code == 1
    assert "does not hold" in result.stderr
    bundle = json.loads(place.read_text())
    for broken in ("{}", "no json", json.dumps({**bundle, "dsseEnvelope": {}}), "[]", ""):
        place.write_text(broken)
        result = run("verify", "acme/tone", "--key", signed[1], "--signature", place)
        assert result.exit_code == 1, broken
        assert "error:" in result.stderr


def test_a_changed_statement_does_not_pass(signed, tmp_path: Path) -> None:
    """Every byte of the signed statement counts: the digests in it cannot be edited."""
    import base64

    place = tmp_path / "tone.sig"
    assert run("sign", "acme/tone", "--key", signed[0], "--out", place).exit_code == 0
    bundle = json.loads(place.read_text())
    payload = bytearray(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload[len(payload) // 2] ^= 1
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    place.write_text(json.dumps(bundle))
    result = run("verify", "acme/tone", "--key", signed[1], "--signature", place)
    assert result.exit_code == 1
    assert "is not by" in result.stderr


def test_keys_that_cannot_be_used(signed, tmp_path: Path) -> None:
    edwards = pair(tmp_path, "edwards", ed25519.Ed25519PrivateKey.generate())
    for words in (
        ("sign", "acme/tone", "--key", edwards[0]),
        ("sign", "acme/tone", "--key", signed[1]),
        ("verify", "acme/tone", "--key", signed[0]),
    ):
        result = run(*words)
        assert result.exit_code == 2, words
        assert "hint:" in result.stderr
    assert run("sign", "acme/tone", "--key", tmp_path / "none.pem").exit_code == 1
    signed[0].chmod(0o644)
    assert "chmod 600" in run("sign", "acme/tone", "--key", signed[0]).stderr
    assert run("verify", "--key", signed[1]).exit_code == 2
