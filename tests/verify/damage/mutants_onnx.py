"""Damage to ONNX folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from exporter.sources.onnx.file import OnnxFile
from exporter.tensors import Array
from tests.support.trained import TRAINED_IDS
from tests.verify.damage.corruptions import onnx_set_attribute, onnx_shift_queries, onnx_stale_head, poke
from tests.verify.damage.mutants_hf import AUXILIARY, Damage, edit

DATA: Final = "onnx/model.onnx_data"


def raw(folder: Path, name: str) -> Array:
    file = OnnxFile.open(folder)
    return file.rows(name, 0, file.initialisers[name].shape[0])


def put(folder: Path, name: str, value: Array) -> None:
    place = OnnxFile.open(folder).initialisers[name].place
    assert place
    poke(place.path, place.offset_bytes, np.ascontiguousarray(value).tobytes())


def pick(folder: Path, rng: np.random.Generator, *parts: str) -> str:
    names = [name for name, tensor in OnnxFile.open(folder).initialisers.items() if tensor.place and "layers" in name]
    return str(rng.choice([name for name in names if not parts or name.endswith(parts)]))


def flip(folder: Path, rng: np.random.Generator, *parts: str) -> None:
    name = pick(folder, rng, *parts)
    value = raw(folder, name)
    flat = value.reshape(-1).view(np.uint8)
    flat[rng.integers(len(flat))] ^= np.uint8(1 << rng.integers(8))
    put(folder, name, value)


def next_float(folder: Path, rng: np.random.Generator) -> None:
    name = "embed_tokens.weight"
    value = raw(folder, name)
    token_id, column = rng.choice(TRAINED_IDS), rng.integers(value.shape[1])
    value[token_id, column] = np.nextafter(value[token_id, column], np.float32(np.inf))
    put(folder, name, value)


def swap_rows(folder: Path, rng: np.random.Generator, *, trained: bool) -> None:
    value = raw(folder, "embed_tokens.weight")
    first, second = rng.choice(TRAINED_IDS if trained else len(value), 2, replace=False)
    value[[first, second]] = value[[second, first]]
    put(folder, "embed_tokens.weight", value)


def swap_columns(folder: Path, rng: np.random.Generator) -> None:
    """Two queries or keys: rows of the checkpoint are columns here."""
    name = pick(folder, rng, "q_proj.weight", "k_proj.weight")
    value = raw(folder, name)
    first, second = rng.choice(value.shape[1], 2, replace=False)
    value[:, [first, second]] = value[:, [second, first]]
    put(folder, name, value)


def transpose(folder: Path, rng: np.random.Generator) -> None:
    """A square matrix as in the checkpoint: the same rows, but another product."""
    name = pick(folder, rng, "o_proj.weight", "q_proj.weight")
    put(folder, name, raw(folder, name).T)


def scale(folder: Path, rng: np.random.Generator) -> None:
    name = pick(folder, rng, "layernorm.weight")
    put(folder, name, raw(folder, name) * np.float32(1.001))


def exchange(folder: Path, rng: np.random.Generator) -> None:
    part = rng.choice(["self_attn.v_proj", "mlp.up_proj"])
    first_name, second_name = (f"layers.{layer}.{part}.weight" for layer in (0, 1))
    first, second = raw(folder, first_name), raw(folder, second_name)
    put(folder, first_name, second)
    put(folder, second_name, first)


def rotary(folder: Path, rng: np.random.Generator) -> None:
    """Change one entry of a table, at a position beyond the texts of the verification."""
    name = str(rng.choice(["rotary_emb.cos_cache", "rotary_emb.sin_cache"]))
    value = raw(folder, name)
    value[rng.integers(100, len(value)), rng.integers(value.shape[1])] += np.float32(0.01)
    put(folder, name, value)


def shorten(folder: Path, rng: np.random.Generator) -> None:
    content = (folder / DATA).read_bytes()
    (folder / DATA).write_bytes(content[: -int(rng.integers(1, len(content) // 2))])


def cut_graph(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "onnx" / "model.onnx"
    content = path.read_bytes()
    path.write_bytes(content[: -int(rng.integers(1, len(content) // 2))])


def graph(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    path = OnnxFile.open(folder).path
    model = onnx.load(path, load_external_data=False)
    change(model)
    onnx.save(model, path)


def no_mask(folder: Path, rng: np.random.Generator) -> None:
    """Every query attends to later positions."""

    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "LessOrEqual")
        node.op_type = "GreaterOrEqual"

    graph(folder, change)


def no_padding(folder: Path, rng: np.random.Generator) -> None:
    """Padding is attended to, which only a left-padded batch shows."""

    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "And")
        node.op_type = "Or" if rng.integers(2) else "And"
        node.input[1] = node.input[0]

    graph(folder, change)


def attribute(folder: Path, rng: np.random.Generator, *, op_type: str, name: str, values: tuple[float, ...]) -> None:
    onnx_set_attribute(folder, op_type, name, values[rng.integers(len(values))])


def epsilon(folder: Path, rng: np.random.Generator) -> None:
    """A change so small that its effect on logits is below a runtime's noise."""
    attribute(folder, rng, op_type="RMSNormalization", name="epsilon", values=(9e-6, 1.1e-5))


def late_queries(folder: Path, rng: np.random.Generator) -> None:
    onnx_shift_queries(OnnxFile.open(folder).path)


def rename(folder: Path, rng: np.random.Generator) -> None:
    """Rename a cache input: the graph computes the same, but clients do not provide that name."""
    old = f"past_key_values.{rng.integers(2)}.{rng.choice(['key', 'value'])}"

    def change(model: onnx.ModelProto) -> None:
        next(value for value in model.graph.input if value.name == old).name = "past"
        for node in model.graph.node:
            node.input[:] = ["past" if name == old else name for name in node.input]

    graph(folder, change)


def axis(folder: Path, rng: np.random.Generator) -> None:
    def change(model: onnx.ModelProto) -> None:
        value = model.graph.input[int(rng.integers(3, 7))]
        value.type.tensor_type.shape.dim[2].dim_param = "past_length"

    graph(folder, change)


def genai(folder: Path, rng: np.random.Generator) -> None:
    def change(content: dict[str, Any]) -> None:
        table = content["model"] if rng.integers(2) else content["model"]["decoder"]
        numbers = [key for key, value in table.items() if isinstance(value, int)]
        key = str(rng.choice(numbers))
        table[key] += int(rng.integers(1, 9))

    edit(folder / "genai_config.json", change)


def genai_file(folder: Path, rng: np.random.Generator) -> None:
    edit(folder / "genai_config.json", lambda content: content["model"]["decoder"].update(filename="model.onnx"))


def browser(folder: Path, rng: np.random.Generator) -> None:
    edit(folder / "config.json", lambda content: content.pop("transformers.js_config"))


def two_templates(folder: Path, rng: np.random.Generator) -> None:
    """transformers.js would render other chats than genai."""
    edit(folder / "tokenizer_config.json", lambda content: content.update(chat_template="{{ messages }}"))


def stale_head(base: Path) -> Damage:
    """The head gets an initialiser of its own, with the base's rows."""
    return lambda folder, rng: onnx_stale_head(folder, base)


#: name → (artifact of the fixture, level that must catch it, damage)
ONNX: Final[Mapping[str, tuple[str, str, Damage]]] = {
    "onnx: trained row by one ulp": ("onnx", "rows", next_float),
    "onnx: two trained rows swapped": ("onnx", "rows", partial(swap_rows, trained=True)),
    "onnx: two rows swapped": ("onnx", "weights", partial(swap_rows, trained=False)),
    "onnx: bit of another weight": ("onnx", "weights", flip),
    "onnx: bit of another weight in fp16": ("onnx_fp16", "weights", flip),
    "onnx: bit of codes or scales": ("onnx_int4", "weights", flip),
    "onnx: queries or keys swapped": ("onnx", "weights", swap_columns),
    "onnx: norm scaled": ("onnx", "weights", scale),
    "onnx: layers exchanged": ("onnx", "weights", exchange),
    "onnx: rotary table": ("onnx", "weights", rotary),
    "onnx: data shortened": ("onnx", "rows", shorten),
    "onnx: graph shortened": ("onnx", "rows", cut_graph),
    "onnx: epsilon": ("onnx", "rows", epsilon),
    "onnx: key heads": ("onnx", "rows", partial(attribute, op_type="Attention", name="kv_num_heads", values=(1, 4))),
    "onnx: cache input renamed": ("onnx", "rows", rename),
    "onnx: axis renamed": ("onnx", "rows", axis),
    "onnx: genai_config.json": ("onnx", "rows", genai),
    "onnx: genai_config.json names no file": ("onnx", "rows", genai_file),
    "onnx: table for browsers": ("onnx", "rows", browser),
    "onnx: chat templates differ": ("onnx", "rows", two_templates),
    "onnx: square matrix transposed": ("onnx", "full", transpose),
    "onnx: attention sees the future": ("onnx", "full", no_mask),
    "onnx: attention sees padding": ("onnx", "full", no_padding),
    "onnx: scale of attention": (
        "onnx",
        "full",
        partial(attribute, op_type="Attention", name="scale", values=(0.2, 0.3)),
    ),
    "onnx: queries one position late": ("onnx", "full", late_queries),
    **{f"onnx: {name}": ("onnx", "rows", damage) for name, damage in AUXILIARY.items()},
}
