"""Render README.md, the model card with the results of the verification and with usage examples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

import msgspec

from exporter.formats.table import FORMATS, Format
from exporter.formats.usage import Usage
from exporter.release.documents.artifacts import artifacts_of, file_paths, relative_path
from exporter.release.documents.manifest import ArtifactEntry, CardEntry, Manifest, MaterialEntry, ModelEntry, Verdict
from exporter.version import __version__

if TYPE_CHECKING:
    from jinja2 import Template

NAME: Final = "README.md"
#: Texts that become the card's front matter. Tags are not in this list, because the formats add tags of their own.
_METADATA: Final = ("language", "license", "license_name", "license_link", "datasets", "pipeline_tag")
#: Text → heading of the section that the text becomes.
_HEADINGS: Final = {
    "use": "Intended use",
    "limits": "Limits",
    "training": "Training",
    "evaluation": "Evaluation",
    "citation": "Citation",
}
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
#: The last part of the name of a check that only quantised models have.
_EXCESS: Final = "excess KL"
#: Packages whose version can change the bytes of a card.
_RENDERERS: Final = ("huggingface_hub", "Jinja2", "PyYAML")


def to_bytes(manifest: Manifest, model: str) -> bytes:
    """Render the card of ``model`` (a key of the manifest's models) from the manifest alone."""
    entry = manifest.models[model]
    texts = msgspec.structs.asdict(entry.card)
    described = [artifact for artifact in manifest.artifacts if artifact.model == model]
    verdicts = [artifact.verdict for artifact in described if artifact.verdict]
    return _render(
        "card.md.jinja",
        manifest,
        entry.card,
        described,
        title=entry.name,
        adapters=_adapters(manifest, entry),
        parameter_count=entry.parameter_count,
        sections=[(heading, texts[key]) for key, heading in _HEADINGS.items() if texts[key]],
        artifacts=[_row(manifest, artifact) for artifact in described],
        notes=_notes(manifest, described),
        verdicts=[row for artifact in described for row in _verdict_rows(manifest, artifact)],
        levels={verdict.level for verdict in verdicts},
        quantised=any(_EXCESS in check.name for verdict in verdicts for check in verdict.checks),
        adapter_only=any(row.adapter_only for row in _formats(described)),
        usage=list(_usage(manifest, model)),
    )


def index_to_bytes(manifest: Manifest) -> bytes:
    """Render the page that links to the cards of all models and contains the texts that all cards share."""
    cards = [msgspec.structs.asdict(entry.card) for entry in manifest.models.values()]
    shared = {key: value for key, value in cards[0].items() if all(card[key] == value for card in cards)}
    models = [
        {
            "name": entry.name,
            "folder": entry.folder,
            "adapters": ", ".join(_linked(manifest.adapters[name], name) for name in entry.adapters) or "none",
            "artifacts": ", ".join(
                f"{artifact.format} {artifact.storage}" for artifact in manifest.artifacts if artifact.model == key
            ),
        }
        for key, entry in manifest.models.items()
    ]
    return _render(
        "index.md.jinja",
        manifest,
        CardEntry(**shared),
        manifest.artifacts,
        title=manifest.name,
        page=NAME,
        models=models,
    )


def _render(
    template: str, manifest: Manifest, card: CardEntry, described: Sequence[ArtifactEntry], **values: Any
) -> bytes:
    """Render a page that describes the artifacts in ``described``. values: additional variables for the template."""
    from huggingface_hub import ModelCardData

    page = _template(template).render(
        card_data=ModelCardData(**_metadata(manifest, card, described)).to_yaml(),
        summary=card.summary,
        base=_linked(manifest.base),
        ttexport=manifest.tools.get("ttexport", ""),
        **values,
    )
    return page.encode()


@cache
def _template(name: str) -> Template:
    """Load and compile the template ``name`` from this package."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(resources.files(__package__).joinpath(name).read_text("utf-8"))


@cache
def renderers() -> dict[str, str]:
    """Map the name of every package that affects the bytes of a card or Modelfile to the package's version."""
    return {"ttexport": __version__} | {name: version(name) for name in _RENDERERS}


def _formats(artifacts: Sequence[ArtifactEntry]) -> list[Format]:
    """Return the formats that occur in ``artifacts``, in the order of the table ``FORMATS``."""
    names = {artifact.format for artifact in artifacts}
    return [row for name, row in FORMATS.items() if name in names]


def _usage(manifest: Manifest, model: str) -> Iterator[Usage]:
    """Yield usage examples for the artifacts of ``model``.

    Examples for formats with a single file, such as GGUF, come first, because their runtimes need no Python.
    """
    for row in sorted(FORMATS.values(), key=lambda row: not row.is_file):
        if artifacts := artifacts_of(manifest, model, row.name):
            yield from row.usage(artifacts, manifest.models[model].name)


def _metadata(manifest: Manifest, card: CardEntry, artifacts: Sequence[ArtifactEntry]) -> dict[str, Any]:
    formats = _formats(artifacts)
    texts = msgspec.structs.asdict(card)
    metadata: dict[str, Any] = {
        "library_name": next((row.library for row in formats), None),
        "pipeline_tag": "text-generation",
        "tags": [*(card.tags or ()), "ttexport", *sorted({tag for row in formats for tag in row.tags})],
    }
    if _HUB_ID.fullmatch(manifest.base.name):
        metadata["base_model"] = manifest.base.name
        adapters_only = bool(formats) and all(row.adapter_only for row in formats)
        metadata["base_model_relation"] = "adapter" if adapters_only else "finetune"
    return metadata | {key: texts[key] for key in _METADATA if texts[key]}


def _linked(material: MaterialEntry, key: str | None = None) -> str:
    """Return the name of a base or adapter as Markdown, with a link if the name is a hub id.

    key: name of the base or adapter in the manifest.
    """
    revision = f" at `{material.revision}`" if material.revision else ""
    if _HUB_ID.fullmatch(material.name):
        return f"[{material.name}](https://huggingface.co/{material.name}){revision}"
    return f"`{key or material.name}`{revision}"


def _adapters(manifest: Manifest, entry: ModelEntry) -> str:
    """Return a phrase for the text of the card that names the adapters of a model, such as "the adapter A"."""
    names = [_linked(manifest.adapters[name], name) for name in entry.adapters]
    if not names:
        return "no adapter"
    return ("the adapter " if len(names) == 1 else "the adapters ") + ", ".join(names)


def _row(manifest: Manifest, artifact: ArtifactEntry) -> Mapping[str, Any]:
    """Return the row for an artifact in the card's table of files."""
    sizes = {entry.path: entry.size for entry in manifest.files}
    return {
        "path": relative_path(manifest, artifact.model, artifact.path),
        "format": artifact.format,
        "storage": artifact.storage,
        "nbytes": sum(sizes[path] for path in file_paths(manifest, artifact)),
    }


def _notes(manifest: Manifest, artifacts: Sequence[ArtifactEntry]) -> list[tuple[str, list[str]]]:
    """Return every note on the artifacts, each with the paths of the artifacts that the note is about."""
    paths: dict[str, list[str]] = {}
    for artifact in artifacts:
        for note in artifact.notes:
            paths.setdefault(note, []).append(relative_path(manifest, artifact.model, artifact.path))
    return list(paths.items())


def _verdict_rows(manifest: Manifest, artifact: ArtifactEntry) -> Iterator[Mapping[str, Any]]:
    """Yield the rows for an artifact in the card's table of verification results.

    If the artifact is a folder with two or more ONNX models, each model has a row in the table, and one more row shows
    the checks of the folder as a whole. A single row for the whole folder would mix the errors of quantised models with
    the errors of unquantised models.
    """
    path, verdict = relative_path(manifest, artifact.model, artifact.path), artifact.verdict
    if verdict is None:
        yield {"path": path, "level": "off", "verdict": "not verified", "checks": "", "max_abs": "", "mean_kl": ""}
        return
    named = {_owner(check.name) for check in verdict.checks}
    models = [path for path in file_paths(manifest, artifact) if path.endswith(".onnx")]
    owners = {stem: path for path in models if (stem := PurePosixPath(path).stem) in named}
    if len(owners) < 2:
        owners = {}
    for stem, model_path in owners.items():
        checks = [check for check in verdict.checks if _owner(check.name) == stem]
        facts = {name: value for name, value in verdict.facts.items() if _owner(name) == stem}
        part = msgspec.structs.replace(verdict, checks=checks, facts=facts)
        yield _verdict_row(relative_path(manifest, artifact.model, model_path), part)
    rest = [check for check in verdict.checks if _owner(check.name) not in owners]
    facts = {name: value for name, value in verdict.facts.items() if _owner(name) not in owners}
    if rest:
        yield _verdict_row(path, msgspec.structs.replace(verdict, checks=rest, facts=facts))


def _verdict_row(path: str, verdict: Verdict) -> Mapping[str, Any]:
    passed = sum(check.passed for check in verdict.checks)
    return {
        "path": path,
        "level": verdict.level,
        "verdict": "equivalent" if passed == len(verdict.checks) else "**differs**",
        "checks": f"{passed} of {len(verdict.checks)}",
        "max_abs": _worst(verdict, "max abs"),
        "mean_kl": _worst(verdict, "mean KL"),
    }


def _owner(name: str) -> str:
    """Return the file name, without suffix, of the model whose check or measured value is called ``name``.

    The result is an empty text if ``name`` does not begin with the file name of a model.
    """
    return name.rpartition(": ")[0]


def _worst(verdict: Verdict, measure: str) -> str:
    """Return the largest value of ``measure`` (such as "max abs") in a verification result, as text with three digits.

    The result is an empty text if the verification did not run the model and therefore measured nothing.
    """
    values = list(_values(verdict, measure))
    return f"{max(values):.2e}" if values else ""


def _values(verdict: Verdict, measure: str) -> Iterator[float]:
    named = [(check.name, check.value) for check in verdict.checks] + list(verdict.facts.items())
    for name, value in named:
        if isinstance(value, float) and name.rpartition(": ")[2] == measure:
            yield value
