"""The documents of a release, each covered by another.

Cards, Modelfiles and artifacts are in the manifest; the manifest is a subject of the provenance; both are in
SHA256SUMS; run.json holds the digests of the manifest and of the signature, which covers all files but itself and
run.json. Whoever rewrites all of them in agreement is stopped by a signature alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from exporter.errors import OutputError
from exporter.io.staging import write_file
from exporter.release.documents import card, checksums, manifest, modelfile, provenance
from exporter.release.documents import run_record as record
from exporter.release.documents.manifest import Manifest
from exporter.release.documents.signature import Signing, sign
from exporter.release.documents.tensor_digests import entries, entry, list_files
from exporter.release.facts import Release, Run

#: Documents at the top of a release, beside the cards and Modelfiles of its models.
NAMES = (manifest.NAME, checksums.NAME, provenance.NAME, record.NAME)


def write_documents(draft: Path, release: Release, run: Run, *, signing: Signing | None = None) -> None:
    """Write every document into ``draft``, which holds the artifacts and nothing else; fsynced, nothing overwritten.

    The same release gives the same bytes, but for run.json and a signature. Reads every artifact twice.
    Raises OutputError for a file that is there already, BadInput for a file name that cannot be listed.
    """
    release = replace(release, tools={**release.tools, **card.makers()})
    files = entries(draft, list_files(draft))
    built = manifest.build(release, files)
    _require_places(draft, built)
    for path, content in derived(draft, built).items():
        write_file(draft / path, content)
        files.append(entry(draft, path))
    built = manifest.build(release, files)
    manifest_bytes, provenance_bytes = manifest.to_bytes(built), provenance.to_bytes(built)
    write_file(draft / manifest.NAME, manifest_bytes)
    write_file(draft / provenance.NAME, provenance_bytes)
    sums = checksums.to_bytes(built, {manifest.NAME: manifest_bytes, provenance.NAME: provenance_bytes})
    write_file(draft / checksums.NAME, sums)
    signature = sign(draft, signing) if signing else None
    write_file(draft / record.NAME, record.to_bytes(run, manifest_bytes, signature))


def derived(folder: Path, built: Manifest) -> dict[str, bytes]:
    """Path below the release → content, of the cards and Modelfiles that follow from the manifest."""
    found = {}
    for key, model in built.models.items():
        place = Path(model.folder)
        found[(place / card.NAME).as_posix()] = card.to_bytes(built, key)
        modelfile_bytes = modelfile.to_bytes(folder, built, key)
        if modelfile_bytes is not None:
            found[(place / modelfile.NAME).as_posix()] = modelfile_bytes
    if card.NAME not in found:
        found[card.NAME] = card.index_to_bytes(built)
    return found


def _require_places(draft: Path, built: Manifest) -> None:
    """Every artifact has files: a release must not promise what is not in it."""
    for artifact in built.artifacts:
        if not (draft / artifact.path).exists():
            raise OutputError(draft / artifact.path, f"expected the artifact of job {artifact.job}, found nothing")
