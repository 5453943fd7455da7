"""model.sig: an OpenSSF model signature over all files of a release except run.json.

The signature is made with a private key without network access, or through Sigstore with the identity of a person or a
CI job. run.json is not signed, because it contains the digest of the signature. That digest reveals a lost or changed
signature even if no key is known, and keeps all other files independent of signing.
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
    """Settings of a signature.

    private_key: PEM file of an elliptic curve (P-256, P-384, P-521). If None, Sigstore signs.
    identity_token: token for Sigstore. If None, the token of the CI job is used; outside of CI, Sigstore opens a
    browser.
    """

    private_key: Path | None = None
    password: str | None = None
    identity_token: str | None = None


def sign(folder: Path, signing: Signing) -> bytes:
    """Write the signature into ``folder`` and return the signature.

    Raises BadInput if the key is unusable and OutputError if Sigstore does not answer.
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
    """Check before any work that ``sign`` will be possible. Raises MissingDependency, or BadInput for an unusable key.

    A Sigstore identity is checked only during signing, because Sigstore tokens expire within minutes.
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
    """The required signer: the holder of a key (PEM file), or an identity that a Sigstore issuer authenticated."""

    public_key: Path | None = None
    identity: str | None = None
    issuer: str | None = None


def signature_fault(folder: Path, trust: Trust) -> str | None:
    """The reason why the signature in ``folder`` is not valid for the files, or None if the signature is valid.

    A check with a key needs no network. A check with Sigstore fetches its roots of trust. Raises BadInput if the key is
    unusable and OutputError if the roots cannot be fetched.
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
    """Translate errors of cryptography to BadInput. key_type: ``private`` or ``public``."""
    try:
        yield
    except (ValueError, TypeError, AttributeError) as exc:
        raise BadInput(f"{key}: expected a {key_type} key of an elliptic curve in PEM: {exc}") from exc


@contextmanager
def _contacting_sigstore() -> Iterator[None]:
    """Translate errors to OutputError. Every package between ttexport and the service has its own exceptions."""
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
