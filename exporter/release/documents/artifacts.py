"""Select the artifacts that a model card lists, and convert their paths to paths relative to the card's folder."""

from __future__ import annotations

from exporter.formats.usage import ReleasedArtifact
from exporter.release.documents.manifest import ArtifactEntry, Manifest
from exporter.sources.gguf.split_files import split_file_stem


def artifacts_of(manifest: Manifest, model: str, fmt: str) -> list[ReleasedArtifact]:
    """Return the artifacts of ``model`` (a key of the manifest's models) in the format named ``fmt``."""
    return [
        ReleasedArtifact(
            path=relative_path(manifest, model, artifact.path),
            storage=artifact.storage,
            files=[relative_path(manifest, model, path) for path in file_paths(manifest, artifact)],
        )
        for artifact in manifest.artifacts
        if artifact.model == model and artifact.format == fmt
    ]


def relative_path(manifest: Manifest, model: str, path: str) -> str:
    """Convert ``path``, which is relative to the release, to a path relative to the folder of ``model``."""
    folder = manifest.models[model].folder
    return path.removeprefix(f"{folder}/") if folder else path


def file_paths(manifest: Manifest, artifact: ArtifactEntry) -> list[str]:
    """Return the sorted paths of all files of an artifact, relative to the release.

    An artifact consists of a single file, of the parts of a split GGUF, or of all files in a folder.
    """
    inside, stem = f"{artifact.path}/", split_file_stem(artifact.path)
    return [
        file.path
        for file in manifest.files
        if file.path == artifact.path or file.path.startswith(inside) or (stem and split_file_stem(file.path) == stem)
    ]
