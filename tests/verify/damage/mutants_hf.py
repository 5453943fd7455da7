"""Damage to checkpoint folders, and to auxiliary files that ONNX folders have as well."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporter.sources.hf.checkpoint import Checkpoint
from exporter.tensors import Array
from fixtures.hostile import rawtensors
from tests.support.trained import TRAINED_IDS
from tests.verify.damage.corruptions import hf_stale_head, poke

Damage = Callable[[Path, np.random.Generator], None]
EMBEDDING: Final = "model.embed_tokens.weight"
WEIGHTS: Final = "model.safetensors"


def raw(folder: Path, name: str) -> Array:
    """(rows, bytes) as stored."""
    tensor = Checkpoint.open(folder).tensors[name]
    content = tensor.place.path.read_bytes()[tensor.place.offset_bytes :][: tensor.place.nbytes]
    return np.frombuffer(content, np.uint8).reshape(tensor.spec.n_rows, -1).copy()


def put(folder: Path, name: str, rows: Array) -> None:
    place = Checkpoint.open(folder).tensors[name].place
    poke(place.path, place.offset_bytes, np.ascontiguousarray(rows).tobytes())


def pick(folder: Path, rng: np.random.Generator, *parts: str) -> str:
    names = [name for name in Checkpoint.open(folder).tensors if name != EMBEDDING]
    return str(rng.choice([name for name in names if not parts or name.endswith(parts)]))


def flip(folder: Path, rng: np.random.Generator) -> None:
    name = pick(folder, rng)
    rows = raw(folder, name)
    rows[rng.integers(len(rows)), rng.integers(rows.shape[1])] ^= np.uint8(1 << rng.integers(8))
    put(folder, name, rows)


def next_value(folder: Path, rng: np.random.Generator) -> None:
    """A number of a trained row becomes its neighbour in bfloat16: one unit of the last place."""
    rows = raw(folder, EMBEDDING)
    rows[rng.choice(TRAINED_IDS), 2 * rng.integers(rows.shape[1] // 2)] ^= 1
    put(folder, EMBEDDING, rows)


def swap_rows(folder: Path, rng: np.random.Generator, *, trained: bool = False, parts: tuple[str, ...] = ()) -> None:
    name = pick(folder, rng, *parts) if parts else EMBEDDING
    rows = raw(folder, name)
    first, second = rng.choice(TRAINED_IDS if trained else len(rows), 2, replace=False)
    rows[[first, second]] = rows[[second, first]]
    put(folder, name, rows)


def transpose(folder: Path, rng: np.random.Generator) -> None:
    name = pick(folder, rng, "o_proj.weight", "q_proj.weight")
    put(folder, name, raw(folder, name).view(np.uint16).T)


def flip_header(folder: Path, rng: np.random.Generator) -> None:
    path = folder / WEIGHTS
    content = path.read_bytes()
    at = int(rng.integers(8, 8 + int.from_bytes(content[:8], "little")))
    poke(path, at, bytes([content[at] ^ (1 << int(rng.integers(7)))]))


def drop_tensor(folder: Path, rng: np.random.Generator) -> None:
    rawtensors.remove(folder / WEIGHTS, pick(folder, rng))


def exchange(folder: Path, rng: np.random.Generator) -> None:
    """Exchange the names of two tensors of one shape."""
    header, data = rawtensors.read(folder / WEIGHTS)
    part = rng.choice(["q_proj", "up_proj", "down_proj"])
    first, second = (name for name in rawtensors.tensors(header) if str(part) in name)
    header[first], header[second] = header[second], header[first]
    rawtensors.write(folder / WEIGHTS, header, data)


def retype(folder: Path, rng: np.random.Generator) -> None:
    header, data = rawtensors.read(folder / WEIGHTS)
    header[pick(folder, rng)]["dtype"] = "F16"
    rawtensors.write(folder / WEIGHTS, header, data)


def truncate(folder: Path, rng: np.random.Generator, *, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: -int(rng.integers(1, len(content) // 2))])


def lose(folder: Path, rng: np.random.Generator, *, names: tuple[str, ...]) -> None:
    for path in (folder / str(name) for name in [rng.choice(names)]):
        path.unlink()


def lose_template(folder: Path, rng: np.random.Generator) -> None:
    """Remove the template from both places."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit(folder / "tokenizer_config.json", lambda content: content.pop("chat_template", None))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2))


def config(folder: Path, rng: np.random.Generator, *, key: str, values: tuple[Any, ...]) -> None:
    edit(folder / "config.json", lambda content: content.update({key: values[rng.integers(len(values))]}))


def rope(folder: Path, rng: np.random.Generator) -> None:
    edit(folder / "config.json", lambda content: content["rope_parameters"].update(rope_theta=20000.0))


def generation(folder: Path, rng: np.random.Generator) -> None:
    change = {str(rng.choice(["eos_token_id", "bos_token_id", "pad_token_id"])): int(rng.integers(4, 512))}
    edit(folder / "generation_config.json", lambda content: content.update(change))


def sampling(folder: Path, rng: np.random.Generator) -> None:
    edit(folder / "generation_config.json", lambda content: content.update(temperature=float(rng.uniform(0.1, 2))))


def lose_added(folder: Path, rng: np.random.Generator) -> None:
    edit(folder / "tokenizer.json", lambda content: content["added_tokens"].pop(int(rng.integers(4))))


def swap_tokens(folder: Path, rng: np.random.Generator) -> None:
    def change(content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        first, second = rng.choice(list(vocab), 2, replace=False)
        vocab[str(first)], vocab[str(second)] = vocab[str(second)], vocab[str(first)]

    edit(folder / "tokenizer.json", change)


def swap_merges(folder: Path, rng: np.random.Generator) -> None:
    def change(content: dict[str, Any]) -> None:
        merges = content["model"]["merges"]
        at = int(rng.integers(len(merges) - 1))
        merges[at], merges[at + 1] = merges[at + 1], merges[at]

    edit(folder / "tokenizer.json", change)


def lose_merges(folder: Path, rng: np.random.Generator) -> None:
    """Every word is split into its bytes."""
    edit(folder / "tokenizer.json", lambda content: content["model"].update(merges=[]))


def not_special(folder: Path, rng: np.random.Generator) -> None:
    edit(folder / "tokenizer.json", lambda content: content["added_tokens"][int(rng.integers(4))].update(special=False))


def lose_decoder(folder: Path, rng: np.random.Generator) -> None:
    edit(folder / "tokenizer.json", lambda content: content.update(decoder=None))


def special_token(folder: Path, rng: np.random.Generator) -> None:
    change = {str(rng.choice(["eos_token", "bos_token", "pad_token"])): "<|endoftext|>"}
    edit(folder / "tokenizer_config.json", lambda content: content.update(change))


def template(folder: Path, rng: np.random.Generator) -> None:
    """Remove a character from the file that clients read first."""
    path = folder / "chat_template.jinja"
    text = path.read_text()
    at = int(rng.integers(len(text)))
    path.write_text(text[:at] + text[at + 1 :])


def point_elsewhere(folder: Path, rng: np.random.Generator) -> None:
    def change(content: dict[str, Any]) -> None:
        names = list(content["weight_map"])
        name = str(rng.choice(names))
        others = sorted(set(content["weight_map"].values()) - {content["weight_map"][name]})
        content["weight_map"][name] = str(rng.choice(others))

    edit(folder / "model.safetensors.index.json", change)


def lose_shard(folder: Path, rng: np.random.Generator) -> None:
    rng.choice(sorted(folder.glob("model-*.safetensors"))).unlink()


#: Damage to files that ONNX folders have, too.
AUXILIARY: Final[Mapping[str, Damage]] = {
    "epsilon in config.json": partial(config, key="rms_norm_eps", values=(1e-6, 1e-4)),
    "heads in config.json": partial(config, key="num_attention_heads", values=(2, 8)),
    "vocabulary in config.json": partial(config, key="vocab_size", values=(511, 513, 1024)),
    "rope base in config.json": rope,
    "tie flag in config.json": partial(config, key="tie_word_embeddings", values=(False,)),
    "special id in config.json": partial(config, key="eos_token_id", values=(0, 7, [2, 7])),
    "context in config.json": partial(config, key="max_position_embeddings", values=(256, 4096)),
    "generation config, special id": generation,
    "generation config, sampling": sampling,
    "added token lost": lose_added,
    "tokens swapped": swap_tokens,
    "merges reordered": swap_merges,
    "token no longer special": not_special,
    "decoder lost": lose_decoder,
    "special token in the settings": special_token,
    "chat template changed": template,
    "chat template missing": lose_template,
    "file missing": partial(lose, names=("tokenizer.json", "tokenizer_config.json", "generation_config.json")),
}
#: name → (artifact of the fixture, level that must catch it, damage)
HF: Final[Mapping[str, tuple[str, str, Damage]]] = {
    "hf: trained row by one ulp": ("hf", "rows", next_value),
    "hf: two trained rows swapped": ("hf", "rows", partial(swap_rows, trained=True)),
    "hf: two rows swapped": ("hf", "weights", swap_rows),
    "hf: bit of another weight": ("hf", "weights", flip),
    "hf: bit of the header": ("hf", "weights", flip_header),
    "hf: rows of queries or keys swapped": (
        "hf",
        "weights",
        partial(swap_rows, parts=("q_proj.weight", "k_proj.weight")),
    ),
    "hf: square matrix transposed": ("hf", "weights", transpose),
    "hf: tensors exchanged": ("hf", "weights", exchange),
    "hf: tensor missing": ("hf", "rows", drop_tensor),
    "hf: dtype of a tensor": ("hf", "weights", retype),
    "hf: truncated": ("hf", "rows", partial(truncate, name=WEIGHTS)),
    "hf: shard missing": ("hf_sharded", "rows", lose_shard),
    "hf: index points elsewhere": ("hf_sharded", "rows", point_elsewhere),
    **{f"hf: {name}": ("hf", "rows", damage) for name, damage in AUXILIARY.items()},
}


def stale_head(base: Path) -> Damage:
    """A head stored beside the tied embedding, with the base's rows."""
    return lambda folder, rng: hf_stale_head(folder, base)
