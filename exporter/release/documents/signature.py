"""model.sig: an OpenSSF model signature over all files of a release but run.json.

By key, which needs no network, or by Sigstore, where the identity of a person or of a CI job takes the key's place.
run.json is left out because it holds the signature's digest: so a release that lost or changed its signature is seen
without a key, and signing does not make the released files differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, OutputError, reading, writing
from exporter.packages import MODEL_SIGNING
from exporter.release.documents import run_record as record
from exporter.release.documents.tensor_digests import FOREIGN

SIGNATURE: Final = "model.sig"
_MAX_REASON: Final = 120


@dataclass(frozen=True, kw_only=True)
class Signing:
    """How to sign. private_key: PEM file of an elliptic curve (P-256, P-384, P-521); None: Sigstore.

    identity_token: of Sigstore; None: the ambient one of the CI job, else a browser asks.
    """

    private_key: Path | None = None
    password: str | None = None
    identity_token: str | None = None


def sign(folder: Path, how: Signing) -> bytes:
    """Write the signature into ``folder`` and return it.

    Raises BadInput for a key that cannot be used, OutputError where Sigstore does not answer.
    """
    path = folder / SIGNATURE
    if how.private_key is None:
        model_signing = require()
        config = model_signing.signing.Config().set_hashing_config(_hashing(model_signing))
        with _asking_sigstore():
            config.use_sigstore_signer(
                identity_token=how.identity_token, use_ambient_credentials=not how.identity_token
            )
            config.sign(folder, path)
    else:
        config = _with_key(how.private_key, how.password)
        with writing(path):
            config.sign(folder, path)
    return path.read_bytes()


def require_signer(how: Signing) -> None:
    """Say so before there is anything to sign. Raises MissingDependency, and BadInput for a key that cannot be used.

    Whom Sigstore believes is asked when it signs: its tokens live for minutes.
    """
    if how.private_key is None:
        require()
    else:
        _with_key(how.private_key, how.password)


def _with_key(key: Path, password: str | None) -> Any:
    model_signing = require()
    config = model_signing.signing.Config().set_hashing_config(_hashing(model_signing))
    with reading(key), _using(key, "private"):
        # Annotated as text, but handed to cryptography, which wants bytes.
        config.use_elliptic_key_signer(private_key=key, password=password.encode() if password is not None else None)
    return config


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Whom to believe: the holder of a key (PEM file), or an identity that a Sigstore issuer knows."""

    public_key: Path | None = None
    identity: str | None = None
    issuer: str | None = None


def why_not_signed(folder: Path, trust: Trust) -> str | None:
    """Why the signature in ``folder`` does not hold for its files, or None if it does.

    A key needs no network; Sigstore fetches its roots of trust. Raises BadInput for a key that cannot be used,
    OutputError where they cannot be had.
    """
    model_signing = require()
    config = model_signing.verifying.Config()
    if trust.public_key is None:
        with _asking_sigstore():
            config.use_sigstore_verifier(identity=trust.identity, oidc_issuer=trust.issuer)
    else:
        with reading(trust.public_key), _using(trust.public_key, "public"):
            config.use_elliptic_key_verifier(public_key=trust.public_key)
    # A folder of the hub's cache is made of links to files; what they hold is compared.
    config.set_hashing_config(_hashing(model_signing).set_allow_symlinks(True))
    try:
        config.verify(folder, folder / SIGNATURE)
    except Exception as exc:  # a hostile signature fails in the parsers of several packages
        # It lists every file that differs, with digests: those have findings of their own.
        return " ".join(str(exc).split())[:_MAX_REASON] or type(exc).__name__
    return None


@contextmanager
def _using(key: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, AttributeError) as exc:
        raise BadInput(f"{key}: expected a {kind} key of an elliptic curve in PEM: {exc}") from exc


@contextmanager
def _asking_sigstore() -> Iterator[None]:
    """What may go wrong at a service has as many kinds as there are packages between it and here."""
    try:
        yield
    except Exception as exc:
        raise OutputError("Sigstore", f"no answer that helps: {' '.join(str(exc).split())[:_MAX_REASON]}") from exc


def require() -> Any:
    """The package model_signing. Raises MissingDependency."""
    try:
        import model_signing
    except ImportError as exc:
        raise MODEL_SIGNING.missing("a signature") from exc
    return model_signing


def _hashing(model_signing: Any) -> Any:
    ignored = [SIGNATURE, record.NAME, *FOREIGN]
    return model_signing.hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=False)
