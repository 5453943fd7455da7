"""Create and verify model.sig, an OpenSSF model signature over all files of a release except run.json.

The signature is made with a private key without network access, or through Sigstore with the identity of a person or a
CI job. The file run.json is not signed, because run.json contains the digest of the signature. With the digest of the
signature in run.json, a lost or changed signature is detected even without the public key. Signing a release changes no
file except run.json and model.sig.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, OutputError, foreign_line, reading, writing
from exporter.packages import MODEL_SIGNING
from exporter.release.documents import run_record
from exporter.release.documents.tensor_digests import FOREIGN

SIGNATURE: Final = "model.sig"
_MAX_REASON_CHARS: Final = 120


@dataclass(frozen=True, kw_only=True)
class Signing:
    """Settings for signing a release.

    private_key: PEM file with a private key on an elliptic curve (P-256, P-384 or P-521). If ``private_key`` is None,
    Sigstore is used for signing. identity_token: identity token for Sigstore. If ``identity_token`` is None, the token
    of the CI job is used; outside of CI, Sigstore opens a browser.
    """

    private_key: Path | None = None
    password: str | None = None
    identity_token: str | None = None


def sign(folder: Path, signing: Signing) -> bytes:
    """Sign the files in ``folder``, write the signature into ``folder``, and return the bytes of the signature.

    Raises BadInput if the private key is unusable and OutputError if Sigstore does not answer.
    """
    path = folder / SIGNATURE
    if signing.private_key is None:
        model_signing = require_model_signing()
        config = model_signing.signing.Config().set_hashing_config(_hashing(model_signing))
        with _contacting_sigstore():
            config.use_sigstore_signer(
                identity_token=signing.identity_token, use_ambient_credentials=not signing.identity_token
            )
            config.sign(folder, path)
    else:
        config = _with_key(signing.private_key, signing.password)
        with writing(path):
            config.sign(folder, path)
    return path.read_bytes()


def require_signer(signing: Signing) -> None:
    """Check, before the release is made, that the signing package and the private key are usable.

    Raises MissingDependency if the signing package is not installed, and BadInput if the private key is unusable. A
    Sigstore identity is checked only at the time of signing, because Sigstore tokens expire within minutes.
    """
    if signing.private_key is None:
        require_model_signing()
    else:
        _with_key(signing.private_key, signing.password)


def _with_key(key: Path, password: str | None) -> Any:
    model_signing = require_model_signing()
    config = model_signing.signing.Config().set_hashing_config(_hashing(model_signing))
    with reading(key), _loading_key(key, "private"):
        # The parameter is annotated as text but passed to cryptography, which requires bytes.
        config.use_elliptic_key_signer(private_key=key, password=password.encode() if password is not None else None)
    return config


@dataclass(frozen=True, kw_only=True)
class Trust:
    """The required signer of a release: the owner of a key (PEM file), or an identity authenticated by Sigstore."""

    public_key: Path | None = None
    identity: str | None = None
    issuer: str | None = None


def signature_fault(folder: Path, trust: Trust) -> str | None:
    """Return the reason why the signature in ``folder`` is not valid for the files, or None if the signature is valid.

    Verifying a signature with a public key needs no network. Verifying a Sigstore signature downloads Sigstore's root
    certificates. Raises BadInput if the public key is unusable and OutputError if Sigstore's root certificates cannot
    be downloaded.
    """
    model_signing = require_model_signing()
    config = model_signing.verifying.Config()
    if trust.public_key is None:
        with _contacting_sigstore():
            config.use_sigstore_verifier(identity=trust.identity, oidc_issuer=trust.issuer)
    else:
        with reading(trust.public_key), _loading_key(trust.public_key, "public"):
            config.use_elliptic_key_verifier(public_key=trust.public_key)
    # A folder in the hub's cache consists of links. The content that the links point to is compared.
    config.set_hashing_config(_hashing(model_signing).set_allow_symlinks(True))
    try:
        config.verify(folder, folder / SIGNATURE)
    except Exception as exc:  # a hostile signature fails in the parsers of several packages
        # The rest of the message lists every file that differs. The check of the digests reports the same files.
        return foreign_line(exc, max_chars=_MAX_REASON_CHARS)
    return None


@contextmanager
def _loading_key(key: Path, key_type: str) -> Iterator[None]:
    """Convert exceptions that the package cryptography raises in the ``with`` body to BadInput.

    key_type: ``private`` or ``public``.
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError) as exc:
        raise BadInput(f"{key}: expected a PEM file with a {key_type} elliptic-curve key: {exc}") from exc


@contextmanager
def _contacting_sigstore() -> Iterator[None]:
    """Convert every exception that Sigstore raises in the ``with`` body to OutputError.

    Exceptions of any class are converted, because every package between ttexport and Sigstore's service raises its own
    exceptions.
    """
    try:
        yield
    except Exception as exc:
        raise OutputError("Sigstore", f"no usable answer: {foreign_line(exc, max_chars=_MAX_REASON_CHARS)}") from exc


def require_model_signing() -> Any:
    """Import the package model_signing. Raises MissingDependency."""
    try:
        import model_signing
    except ImportError as exc:
        raise MODEL_SIGNING.missing("a signature") from exc
    return model_signing


def _hashing(model_signing: Any) -> Any:
    ignored = [SIGNATURE, run_record.NAME, *FOREIGN]
    return model_signing.hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=False)
