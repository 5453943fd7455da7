"""Render provenance.intoto.json: an in-toto statement whose SLSA provenance lists the inputs of the release.

Sources: in-toto attestation framework, Statement v1; SLSA v1.0, Build provenance. The provenance statement contains no
time, so two builds of the same release write a byte-identical statement. The time and the machine of the build are
recorded in run.json. The provenance statement is not signed separately, because the signature of the release covers all
files except run.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import quote

from exporter.release.documents import manifest as manifests
from exporter.release.documents.manifest import Manifest, MaterialEntry

NAME: Final = "provenance.intoto.json"
_STATEMENT: Final = "https://in-toto.io/Statement/v1"
_PREDICATE: Final = "https://slsa.dev/provenance/v1"
#: The key ``release`` of externalParameters contains release.toml as it was parsed.
_BUILD_TYPE: Final = "urn:ttexport:release:v1"
#: The builder id is self-asserted. Only the signature of the release authenticates the builder.
_BUILDER: Final = "urn:ttexport:builder:v1"


def to_bytes(manifest: Manifest) -> bytes:
    """Render the provenance statement, whose subjects are every file of ``manifest`` and the manifest itself."""
    digest = hashlib.sha256(manifests.to_bytes(manifest)).hexdigest()
    subjects = {entry.path: entry.sha256 for entry in manifest.files} | {manifests.NAME: digest}
    statement = {
        "_type": _STATEMENT,
        "subject": [{"name": path, "digest": {"sha256": digest}} for path, digest in sorted(subjects.items())],
        "predicateType": _PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": {"release": manifest.spec},
                "internalParameters": {},
                "resolvedDependencies": list(_dependencies(manifest)),
            },
            "runDetails": {"builder": {"id": _BUILDER, "version": manifest.tools}},
        },
    }
    return manifests.to_bytes(statement)


def _dependencies(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Return one in-toto resource descriptor for each input file.

    The files of the base come first, followed by the files of the adapters in the order of the adapter names.
    """
    materials = {"base": manifest.base} | {
        f"adapter {name}": material for name, material in sorted(manifest.adapters.items())
    }
    for role, material in materials.items():
        for path, digest in sorted(material.files.items()):
            descriptor: dict[str, Any] = {"name": f"{role}: {path}", "digest": {"sha256": digest}}
            if material.revision:
                descriptor["uri"] = _package_url(material, path)
            yield descriptor


def _package_url(material: MaterialEntry, path: str) -> str:
    """Return the package URL (purl) of an input file.

    The format is the package-url type ``huggingface``: namespace, name, commit in lower case, and the file as subpath.
    """
    name = quote(material.name, safe="/")
    return f"pkg:huggingface/{name}@{quote((material.revision or '').lower(), safe='')}#{quote(path, safe='/')}"
