from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from exporter.cli.main import run
from exporter.errors import BadInput, MissingDependency, OutputError
from exporter.release.check import check_release
from exporter.release.documents import run_record as record
from exporter.release.documents.signature import Signing, Trust
from exporter.release.documents.write import write_documents
from tests.release.conftest import Drafted
from tests.release.finished import RUN, release
from tests.release.projects import ROWS, Project

PASSWORD = "lamp"


def write_keys(folder: Path, *, password: str | None = None) -> tuple[Path, Path]:
    """(private, public) PEM files of a new P-256 key."""
    key = ec.generate_private_key(ec.SECP256R1())
    lock = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    private, public = folder / "key.pem", folder / "key.pub"
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(pem, pkcs8, lock))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def signed(drafted: Drafted, keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = drafted.copy(tmp_path_factory.mktemp("signed") / "release")
    write_documents(folder, release(drafted.artifacts), RUN, signing=Signing(private_key=keys[0]))
    return folder


@pytest.fixture
def mine(signed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(signed, tmp_path / "release")


def code(folder: Path, key: Path | None = None) -> int:
    return run(["verify", str(folder), "-q", *(["--public-key", str(key)] if key else [])])


def test_a_signed_release_passes_with_its_key_and_without_one(signed: Path, keys: tuple[Path, Path]) -> None:
    assert code(signed, keys[1]) == 0
    assert [skip.reason for skip in check_release(signed).skipped] == [
        "not checked, because neither --public-key nor --identity was given"
    ]


def test_signing_changes_no_released_file(signed: Path, finished: Path) -> None:
    ours = {path.relative_to(signed) for path in signed.rglob("*") if path.is_file()}
    theirs = {path.relative_to(finished) for path in finished.rglob("*") if path.is_file()}
    assert ours - theirs == {Path("model.sig")}
    differing = [str(path) for path in theirs if (signed / path).read_bytes() != (finished / path).read_bytes()]
    assert differing == ["run.json"]


def test_another_key_is_refused(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, other = write_keys(tmp_path)
    assert code(mine, other) == 3
    assert "the folder does not match its manifest: signature: Key mismatch" in capsys.readouterr().err


def test_a_flipped_bit_of_the_signature_is_found_without_a_key(mine: Path) -> None:
    path = mine / "model.sig"
    content = path.read_bytes()
    for at in range(0, len(content), 97):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert [check.name for check in check_release(mine).failures] == ["run.json"]


def test_a_signature_of_other_content_is_found_with_the_key(
    mine: Path, drafted: Drafted, keys: tuple[Path, Path]
) -> None:
    """A consistent rewrite of all documents beside the old signature is detected only with the key."""
    (mine / "hf" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name in ("manifest.json", "SHA256SUMS", "provenance.intoto.json", "run.json", "README.md", "Modelfile"):
        (mine / name).unlink()
    signature = (mine / "model.sig").read_bytes()
    (mine / "model.sig").unlink()
    write_documents(mine, release(drafted.artifacts), RUN)
    assert code(mine) == 0
    assert code(mine, keys[1]) == 3
    (mine / "model.sig").write_bytes(signature)
    (mine / "run.json").write_bytes(record.to_bytes(RUN, (mine / "manifest.json").read_bytes(), signature))
    assert code(mine) == 0
    [failure] = check_release(mine, Trust(public_key=keys[1])).failures
    assert failure.name == "signature"
    assert failure.detail.startswith("Signature mismatch")


def test_a_lost_signature_is_found_without_a_key(mine: Path) -> None:
    (mine / "model.sig").unlink()
    assert [check.name for check in check_release(mine).failures] == ["run.json"]


def test_a_key_with_a_password_signs(drafted: Drafted, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, password=PASSWORD)
    folder = drafted.copy(tmp_path / "release")
    write_documents(folder, release(drafted.artifacts), RUN, signing=Signing(private_key=private, password=PASSWORD))
    assert code(folder, public) == 0


@pytest.mark.parametrize("content", [b"no key", b""])
def test_an_unusable_key_is_exit_4(signed: Path, content: bytes, tmp_path: Path) -> None:
    key = tmp_path / "key.pub"
    key.write_bytes(content)
    assert code(signed, key) == 4
    assert code(signed, tmp_path / "absent.pub") == 4


def test_a_key_of_another_type_cannot_sign(drafted: Drafted, tmp_path: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    path = tmp_path / "rsa.pem"
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    folder = drafted.copy(tmp_path / "release")
    with pytest.raises(BadInput, match=r"rsa\.pem: expected a PEM file with a private elliptic-curve key"):
        write_documents(folder, release(drafted.artifacts), RUN, signing=Signing(private_key=path))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('key = "absent.pem"', "absent.pem: no such file"),
        ('key = "release.toml"', "release.toml: expected a PEM file with a private elliptic-curve key: "),
        ('key = "key.pem"', "key.pem: expected a PEM file with a private elliptic-curve key: Password was not given"),
        (
            'key = "key.pem"\npassword-env = "NO_SUCH"',
            "signing.password-env: expected the environment variable NO_SUCH to be set",
        ),
    ],
)
def test_an_unusable_key_is_refused_before_anything_is_made(
    table: str, message: str, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_keys(project.folder, password=PASSWORD)
    project.write("one", formats="[hf]\n", verify=f"{ROWS}[signing]\n{table}\n")
    piece = tmp_path / "piece"
    assert project.release(piece, "--only", "hf") == 0, "a machine that makes a piece has no key"
    capsys.readouterr()
    for how in ((), ("--assemble", piece)):
        assert project.release(tmp_path / "out", *how) == 4
        stderr = capsys.readouterr().err
        assert message in stderr
        assert stderr.count("\n") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["piece", "project"]


def test_a_release_is_signed_with_the_key_of_release_toml(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, public = write_keys(project.folder, password=PASSWORD)
    monkeypatch.setenv("LAMP_PASSWORD", PASSWORD)
    table = '[signing]\nkey = "key.pem"\npassword-env = "LAMP_PASSWORD"\n'
    assert project.write("one", formats="[hf]\n", verify=ROWS + table).release(tmp_path / "out") == 0
    assert code(tmp_path / "out", public) == 0


def test_without_the_package_a_release_to_be_signed_is_refused_at_the_start(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_keys(project.folder)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for table in ('key = "key.pem"', "sigstore = true"):
        project.write("one", formats="[hf]\n", verify=f"{ROWS}[signing]\n{table}\n")
        assert project.release(tmp_path / "out") == 6
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


def test_without_the_package_a_signature_cannot_be_required(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingDependency, match=r"pip install 'ttexport\[sign\]'"):
        check_release(signed, Trust(public_key=keys[1]))
    assert code(signed) == 0


def test_without_sigstore_nothing_is_signed_or_accepted(
    drafted: Drafted, signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing listens
    folder = drafted.copy(tmp_path / "release")
    with pytest.raises(OutputError, match="Sigstore: no usable answer"):
        write_documents(folder, release(drafted.artifacts), RUN, signing=Signing(identity_token="token"))
    assert not (folder / "model.sig").exists()
    assert run(["verify", str(signed), "-q", "--identity", "me", "--issuer", "https://issuer"]) == 7
