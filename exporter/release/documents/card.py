"""README.md: the model card, with what was verified and how to run it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

import msgspec

from exporter.release.documents.manifest import ArtifactEntry, CardEntry, Manifest, MaterialEntry, ModelEntry, Verdict
from exporter.release.documents.usage import below, held, usages
from exporter.version import __version__

if TYPE_CHECKING:
    from jinja2 import Template

NAME: Final = "README.md"
#: Texts that become the card's front matter, but for the tags, to which some are added.
_METADATA: Final = ("language", "license", "license_name", "license_link", "datasets", "pipeline_tag")
#: Texts that become paragraphs; all but the summary under a heading of their own.
_HEADINGS: Final = {
    "use": "Intended use",
    "limits": "Limits",
    "training": "Training",
    "evaluation": "Evaluation",
    "citation": "Citation",
}
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
#: The check of quantised models, by the end of its name.
_EXCESS: Final = "excess KL"
#: Packages whose version may change the bytes of a card.
_MAKERS: Final = ("huggingface_hub", "Jinja2", "PyYAML")
#: Formats by the hub's name of the library that reads them, the most general first.
_LIBRARIES: Final = {"hf": "transformers", "gguf": "gguf", "onnx": "transformers.js"}


def to_bytes(manifest: Manifest, model: str) -> bytes:
    """The card of ``model`` (a key of the manifest's models), made of the manifest alone."""
    entry = manifest.models[model]
    texts = msgspec.structs.asdict(entry.card)
    described = [one for one in manifest.artifacts if one.model == model]
    return _render(
        "card.md.jinja",
        manifest,
        entry.card,
        described,
        title=entry.name,
        adapters=_adapters(manifest, entry),
        parameter_count=entry.parameter_count,
        sections=[(heading, texts[key]) for key, heading in _HEADINGS.items() if texts[key]],
        artifacts=[_row(manifest, one) for one in described],
        verdicts=[row for one in described for row in _verdict_rows(manifest, one)],
        levels={one.verdict.level for one in described if one.verdict},
        quantised=any(_EXCESS in check.name for one in described if one.verdict for check in one.verdict.checks),
        usage=usages(manifest, model),
    )


def index_to_bytes(manifest: Manifest) -> bytes:
    """The page above the cards of several models, each in its folder; its texts are those that all of them share."""
    cards = [msgspec.structs.asdict(entry.card) for entry in manifest.models.values()]
    shared = {key: value for key, value in cards[0].items() if all(card[key] == value for card in cards)}
    models = [
        {
            "name": entry.name,
            "folder": entry.folder,
            "adapters": ", ".join(_linked(manifest.adapters[name], name) for name in entry.adapters) or "none",
            "artifacts": ", ".join(f"{one.format} {one.storage}" for one in manifest.artifacts if one.model == key),
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
    """A page about ``described`` artifacts; ``values`` are those of its template."""
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
    """A template beside this file, compiled once."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(resources.files(__package__).joinpath(name).read_text("utf-8"))


@cache
def makers() -> dict[str, str]:
    """Package → version of all that has a say in the bytes of a card or a Modelfile."""
    return {"ttexport": __version__} | {name: version(name) for name in _MAKERS}


def _metadata(manifest: Manifest, card: CardEntry, artifacts: Sequence[ArtifactEntry]) -> dict[str, Any]:
    formats = {one.format for one in artifacts}
    texts = msgspec.structs.asdict(card)
    found: dict[str, Any] = {
        "library_name": next((name for fmt, name in _LIBRARIES.items() if fmt in formats), None),
        "pipeline_tag": "text-generation",
        "tags": [*(card.tags or ()), "ttexport", *sorted(formats & {"gguf", "onnx"})],
    }
    if _HUB_ID.fullmatch(manifest.base.name):
        found["base_model"] = manifest.base.name
        found["base_model_relation"] = "finetune"
    return found | {key: texts[key] for key in _METADATA if texts[key]}


def _linked(material: MaterialEntry, key: str | None = None) -> str:
    """key: its name in the manifest, which tells folders of one name apart."""
    at = f" at `{material.revision}`" if material.revision else ""
    if _HUB_ID.fullmatch(material.name):
        return f"[{material.name}](https://huggingface.co/{material.name}){at}"
    return f"`{key or material.name}`{at}"


def _adapters(manifest: Manifest, entry: ModelEntry) -> str:
    """The adapters of a model in one phrase."""
    names = [_linked(manifest.adapters[name], name) for name in entry.adapters]
    if not names:
        return "no adapter"
    return ("the adapter " if len(names) == 1 else "the adapters ") + ", ".join(names)


def _row(manifest: Manifest, artifact: ArtifactEntry) -> Mapping[str, Any]:
    """One artifact as a row of the table of files."""
    sizes = {entry.path: entry.size for entry in manifest.files}
    return {
        "path": below(manifest, artifact.model, artifact.path),
        "format": artifact.format,
        "storage": artifact.storage,
        "nbytes": sum(sizes[path] for path in held(manifest, artifact)),
    }


def _verdict_rows(manifest: Manifest, artifact: ArtifactEntry) -> Iterator[Mapping[str, Any]]:
    """One artifact as rows of the table of verdicts; of a folder with several models, a row each and one for the rest.

    The worst of an exact model and a quantised one would be neither's.
    """
    path, verdict = below(manifest, artifact.model, artifact.path), artifact.verdict
    if verdict is None:
        yield {"path": path, "level": "off", "verdict": "not verified", "checks": "", "max_abs": "", "mean_kl": ""}
        return
    named = {_owner(check.name) for check in verdict.checks}
    models = [file for file in held(manifest, artifact) if file.endswith(".onnx")]
    owners = {stem: file for file in models if (stem := PurePosixPath(file).stem) in named}
    if len(owners) < 2:
        owners = {}
    for stem, file in owners.items():
        own = [check for check in verdict.checks if _owner(check.name) == stem]
        facts = {name: value for name, value in verdict.facts.items() if _owner(name) == stem}
        part = msgspec.structs.replace(verdict, checks=own, facts=facts)
        yield _verdict_row(below(manifest, artifact.model, file), part)
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
    """The model of a folder that a check or a fact is about, by the stem of its file; empty for what names none."""
    return name.rpartition(": ")[0]


def _worst(verdict: Verdict, measure: str) -> str:
    """The largest value of a measure among gates and facts, three digits; empty where no model was run."""
    values = list(_values(verdict, measure))
    return f"{max(values):.2e}" if values else ""


def _values(verdict: Verdict, measure: str) -> Iterator[float]:
    named = [(check.name, check.value) for check in verdict.checks] + list(verdict.facts.items())
    for name, value in named:
        if isinstance(value, float) and name.rpartition(": ")[2] == measure:
            yield value
