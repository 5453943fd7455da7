"""``release.toml``: what a release is made of, parsed strictly. Relative paths start at the folder of the file."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from exporter.errors import BadInput, UnreadableFile, UsageError
from exporter.formats.gguf.quantisation.file_types import FILE_TYPES, SELECTABLE_TENSOR_TYPES
from exporter.formats.gguf.split import Split
from exporter.formats.target import DTYPES
from exporter.io.files import read_file
from exporter.release.documents.manifest import CardEntry, card_texts
from exporter.verify.runtimes.installed import NAMES

Dtype = Literal["f32", "f16", "bf16"]

#: Becomes part of paths in the release, and of names on hubs.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
#: What lies beside the folders of several models, and so is no name for one.
_TAKEN: Final = frozenset(
    {
        "manifest.json",
        "model.sig",
        "piece.json",
        "provenance.intoto.json",
        "readme.md",
        "report.json",
        "run.json",
        "sha256sums",
    }
)


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """A table of the file; keys are written with dashes."""


class ModelSpec(_Table, frozen=True):
    """``[models.NAME]``: adapters that go into the base together. card: texts that go before those of ``[card]``."""

    adapters: list[str] = []
    card: dict[str, Any] = {}


class HfSpec(_Table, frozen=True):
    """``[hf]``: a Hugging Face checkpoint. dtype: of unquantised tensors, default as stored."""

    dtype: Dtype | None = None


class GgufSpec(_Table, frozen=True):
    """``[gguf]``: a file for each of ``types``: f32, f16, bf16, or a quantisation of llama.cpp (Q8_0, Q4_K_M, …)."""

    types: list[str]
    imatrix: str | None = None
    token_embedding_type: str | None = None
    output_tensor_type: str | None = None
    split_max_size: str | None = None
    split_max_tensors: int | None = None
    pre_tokenizer: str | None = None


class OnnxSpec(_Table, frozen=True):
    """``[onnx]``: one folder with all ``precisions``: fp32, fp16, int8, int4, int4-sym, q4f16, q4f16-sym.

    ops: as ``--onnx-ops``.
    """

    precisions: list[str] = msgspec.field(default_factory=lambda: ["fp32"])
    ops: Literal["standard", "ort"] = "standard"


class VerifySpec(_Table, frozen=True):
    """``[verify]``: as ``--verify``, ``--prompts`` and ``--require``."""

    level: Literal["full", "rows", "off"] = "full"
    prompts: str | None = None
    require: list[str] = []


class SigningSpec(_Table, frozen=True):
    """``[signing]``: by a private key in a file, or through Sigstore. password_env: the variable with its password."""

    key: str | None = None
    password_env: str | None = None
    sigstore: bool = False


class HubSpec(_Table, frozen=True):
    """``[hub]``: how ``--push-to-hub`` sends the release, unless its own options say otherwise."""

    revision: str | None = None
    message: str | None = None
    private: bool = False


class ReleaseSpec(_Table, frozen=True):
    """The whole file. base: a path, or a hub id (org/name, org/name@revision); adapters likewise."""

    name: str
    version: str
    base: str
    models: dict[str, ModelSpec]
    untie: bool = False
    hf: HfSpec | None = None
    gguf: GgufSpec | None = None
    onnx: OnnxSpec | None = None
    verify: VerifySpec = VerifySpec()
    card: dict[str, Any] = {}
    signing: SigningSpec | None = None
    hub: HubSpec | None = None


def read_spec(path: Path) -> ReleaseSpec:
    """Read ``release.toml``; its relative paths come out below its folder.

    Raises UnreadableFile for a file that is no TOML, BadInput for a key that no release has or a value of another kind.
    """
    try:
        found = tomllib.loads(read_file(path).decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise UnreadableFile(path, f"expected TOML: {exc}") from exc
    for where, key, known in _unknown(ReleaseSpec, found, ""):
        near = difflib.get_close_matches(key, known, 1, 0.0)
        raise BadInput(f"{path}: {where}{key}: unknown key; the nearest known one is {near[0]}")
    try:
        spec = msgspec.convert(found, ReleaseSpec)
    except msgspec.ValidationError as exc:
        raise BadInput(f"{path}: {exc}") from exc
    card_texts(spec.card, f"{path}: card")
    for name, model in spec.models.items():
        card_texts(model.card, f"{path}: models.{name}.card")
    for reason in (*_faults(spec), *_astray(spec, path.parent)):
        raise BadInput(f"{path}: {reason}")
    return _placed(spec, path.parent)


def _unknown(kind: type[msgspec.Struct], table: Mapping[str, Any], where: str) -> Iterator[tuple[str, str, list[str]]]:
    """(table, key, the keys that it may have) for every key that the table does not know."""
    fields = {field.encode_name: field.name for field in msgspec.structs.fields(kind)}
    for key, value in table.items():
        if key not in fields:
            yield where, key, list(fields)
        elif isinstance(value, dict) and key == "models":
            for name, model in value.items():
                if isinstance(model, dict):
                    yield from _unknown(ModelSpec, model, f"models.{name}.")
        elif isinstance(value, dict) and key in _TABLES:
            yield from _unknown(_TABLES[key], value, f"{where}{key}.")


_TABLES: Final[Mapping[str, type[msgspec.Struct]]] = {
    "hf": HfSpec,
    "gguf": GgufSpec,
    "onnx": OnnxSpec,
    "verify": VerifySpec,
    "signing": SigningSpec,
    "hub": HubSpec,
    "card": CardEntry,
}


def _faults(spec: ReleaseSpec) -> Iterator[str]:
    """What the kinds of the values do not say."""
    for key, value in [("name", spec.name), ("version", spec.version), *(("models", name) for name in spec.models)]:
        if not _NAME.fullmatch(value):
            yield f"{key}: expected letters, digits, dots, dashes or underscores, found {value!r:.80}"
    if not spec.models:
        yield "models: expected one or more, found none"
    if len({*map(str.lower, spec.models)}) != len(spec.models):
        yield f"models: expected names that differ in more than case, found {', '.join(spec.models)}"
    for name in spec.models if len(spec.models) > 1 else ():
        if name.lower() in _TAKEN:
            yield f"models.{name}: expected a name for a folder, found that of a document of the release"
    if not (spec.hf or spec.gguf or spec.onnx):
        yield "expected a table hf, gguf or onnx, found none: there is nothing to make"
    lists = {"gguf.types": spec.gguf.types} if spec.gguf else {}
    lists |= {"onnx.precisions": spec.onnx.precisions} if spec.onnx else {}
    for key, values in lists.items():
        if not values or len({*map(str.lower, values)}) != len(values):
            yield f"{key}: expected one or more, each once, found {', '.join(values) or 'none'}"
    if spec.gguf:
        yield from _gguf_faults(spec.gguf)
    for name in spec.verify.require:
        if name not in NAMES:
            yield f"verify.require: expected {', '.join(NAMES)}, found {name!r:.80}"
    if spec.signing and bool(spec.signing.key) == spec.signing.sigstore:
        yield "signing: expected either a key or sigstore = true"


def _gguf_faults(table: GgufSpec) -> Iterator[str]:
    """What would stop llama.cpp's quantiser, or be of no use to it, hours later."""
    try:
        Split.parse(table.split_max_size, table.split_max_tensors)
    except UsageError as exc:
        yield f"gguf.{str(exc).removeprefix('--')}"
    made = {kind.upper() for kind in table.types} & FILE_TYPES.keys()
    for key in ("token_embedding_type", "output_tensor_type"):
        value, name = getattr(table, key), key.replace("_", "-")
        if value is not None and not made:
            yield f"gguf.{name}: needs a quantisation among gguf.types, such as Q4_K_M"
        elif value is not None and value.upper() not in SELECTABLE_TENSOR_TYPES:
            yield f"gguf.{name}: expected a type of ggml, such as Q6_K or F16, found {value!r:.80}"
    if table.imatrix is not None and not made - {"Q8_0"}:
        yield "gguf.imatrix: needs a quantisation below Q8_0 among gguf.types"


def gguf_types(table: GgufSpec) -> list[str]:
    """Its types, the unquantised ones in lower case as ``--dtype`` has them, the others in upper case as llama.cpp."""
    return [kind.lower() if kind.lower() in DTYPES else kind.upper() for kind in table.types]


def _astray(spec: ReleaseSpec, folder: Path) -> Iterator[str]:
    """Words that name nothing below ``folder``, but something where the command runs: elsewhere they would not."""
    words = [("base", spec.base)]
    words += [(f"models.{name}.adapters", word) for name, model in spec.models.items() for word in model.adapters]
    for key, word in words:
        if not os.path.lexists(folder / word) and os.path.lexists(word):
            yield f"{key}: expected a path from the folder of this file, or a hub id, found {word!r:.80} elsewhere"


def _placed(spec: ReleaseSpec, folder: Path) -> ReleaseSpec:
    """With paths below ``folder``; what is not there may be a hub id and stays."""

    def place(word: str) -> str:
        path = folder / word
        return str(path) if os.path.lexists(path) else word

    def file(word: str | None) -> str | None:
        return None if word is None else str(folder / word)

    replace = msgspec.structs.replace
    models = {
        name: replace(model, adapters=[place(word) for word in model.adapters]) for name, model in spec.models.items()
    }
    return replace(
        spec,
        base=place(spec.base),
        models=models,
        gguf=spec.gguf and replace(spec.gguf, imatrix=file(spec.gguf.imatrix)),
        verify=replace(spec.verify, prompts=file(spec.verify.prompts)),
        signing=spec.signing and replace(spec.signing, key=file(spec.signing.key)),
    )
