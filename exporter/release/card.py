"""README.md: the model card, with what was verified and how to run it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, Final

from exporter.release.manifest import ArtifactEntry, Manifest, MaterialEntry, ModelEntry, Verdict
from exporter.release.usage import below, held, usages

NAME: Final = "README.md"
#: Texts of ``release.toml`` that become the card's front matter, as the hub reads it.
METADATA_KEYS: Final = ("language", "license", "license_name", "license_link", "datasets", "tags", "pipeline_tag")
#: Texts that become paragraphs; all but the summary under a heading of their own.
HEADINGS: Final = {
    "use": "Intended use",
    "limits": "Limits",
    "training": "Training",
    "evaluation": "Evaluation",
    "citation": "Citation",
}
#: All that a card may be given.
KEYS: Final = (*METADATA_KEYS, "summary", *HEADINGS)
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
_TEMPLATE: Final = "card.md.jinja"
#: Formats by the hub's name of the library that reads them, the most general first.
_LIBRARIES: Final = {"hf": "transformers", "gguf": "gguf", "onnx": "transformers.js"}


def to_bytes(manifest: Manifest, model: str) -> bytes:
    """The card of ``model`` (a key of the manifest's models), made of the manifest alone."""
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    entry = manifest.models[model]
    artifacts = [one for one in manifest.artifacts if one.model == model]
    source = resources.files(__package__).joinpath(_TEMPLATE).read_text("utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    page = environment.from_string(source).render(
        card_data=ModelCardData(**_metadata(manifest, entry, artifacts)).to_yaml(),
        title=entry.name,
        texts={"summary": "", **entry.card},
        base=_linked(manifest.base),
        adapters=_adapters(manifest, entry),
        ttexport=manifest.tools.get("ttexport", ""),
        parameter_count=entry.parameter_count,
        sections=[(heading, entry.card[key]) for key, heading in HEADINGS.items() if entry.card.get(key)],
        artifacts=[_row(manifest, one) for one in artifacts],
        usage=usages(manifest, model),
    )
    return page.encode()


def _metadata(manifest: Manifest, entry: ModelEntry, artifacts: list[ArtifactEntry]) -> dict[str, Any]:
    formats = {one.format for one in artifacts}
    given = {key: entry.card[key] for key in METADATA_KEYS if key in entry.card}
    tags = [*given.pop("tags", ()), "ttexport", *sorted(formats & {"gguf", "onnx"})]
    found: dict[str, Any] = {
        "library_name": next((name for fmt, name in _LIBRARIES.items() if fmt in formats), None),
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    if _HUB_ID.fullmatch(manifest.base.name):
        found["base_model"] = manifest.base.name
        found["base_model_relation"] = "finetune"
    return found | given


def _linked(material: MaterialEntry) -> str:
    at = f" at `{material.revision}`" if material.revision else ""
    if _HUB_ID.fullmatch(material.name):
        return f"[{material.name}](https://huggingface.co/{material.name}){at}"
    return f"`{material.name}`{at}"


def _adapters(manifest: Manifest, entry: ModelEntry) -> str:
    """The adapters of a model in one phrase."""
    names = [_linked(manifest.adapters[name]) for name in entry.adapters]
    if not names:
        return "no adapter"
    return ("the adapter " if len(names) == 1 else "the adapters ") + ", ".join(names)


def _row(manifest: Manifest, artifact: ArtifactEntry) -> Mapping[str, Any]:
    """One artifact as a row of both tables."""
    sizes = {entry.path: entry.size for entry in manifest.files}
    verdict = artifact.verdict
    return {
        "path": below(manifest, artifact.model, artifact.path),
        "format": artifact.format,
        "storage": artifact.storage,
        "nbytes": sum(sizes[path] for path in held(manifest, artifact)),
        "level": verdict.level if verdict else "off",
        "verdict": ("equivalent" if verdict.passed else "**differs**") if verdict else "not verified",
        "checks": f"{sum(check.passed for check in verdict.checks)} of {len(verdict.checks)}" if verdict else "",
        "max_abs": _worst(verdict, "max abs"),
        "mean_kl": _worst(verdict, "mean KL"),
    }


def _worst(verdict: Verdict | None, measure: str) -> str:
    """The largest value of a measure among gates and facts, three digits; empty where no model was run."""
    values = list(_values(verdict, measure)) if verdict else []
    return f"{max(values):.2e}" if values else ""


def _values(verdict: Verdict, measure: str) -> Iterator[float]:
    named = [(check.name, check.value) for check in verdict.checks] + list(verdict.facts.items())
    for name, value in named:
        if isinstance(value, float) and name.rpartition(": ")[2] == measure:
            yield value
