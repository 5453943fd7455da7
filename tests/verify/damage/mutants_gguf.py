"""Damage to GGUF files. Each function takes a copy of a sound file and a random generator that chooses the place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from exporter.formats.gguf import writer
from exporter.sources.gguf.file import GgufFile
from exporter.tensors import Array
from tests.support.trained import TRAINED_IDS
from tests.verify.damage import gguf_edit
from tests.verify.damage.corruptions import poke

Damage = Callable[[Path, np.random.Generator], None]
EMBEDDING: Final = "token_embd.weight"
TOKENS: Final = "tokenizer.ggml.tokens"


def raw(path: Path, name: str) -> Array:
    file = GgufFile.open(path)
    return file.rows(name, 0, file.tensors[name].n_rows)


def put(path: Path, name: str, rows: Array) -> None:
    poke(path, GgufFile.open(path).tensors[name].offset_bytes, np.ascontiguousarray(rows).tobytes())


def pick(path: Path, rng: np.random.Generator, *parts: str) -> str:
    """A tensor with a name that ends in one of ``parts``, or any except the embedding."""
    names = [name for name in GgufFile.open(path).tensors if name != EMBEDDING]
    return str(rng.choice([name for name in names if not parts or name.endswith(parts)]))


def flip(path: Path, rng: np.random.Generator, *parts: str) -> None:
    """One bit of one tensor."""
    name = pick(path, rng, *parts)
    rows = raw(path, name).reshape(-1)
    rows[rng.integers(len(rows))] ^= np.uint8(1 << rng.integers(8))
    put(path, name, rows)


def flip_trained(path: Path, rng: np.random.Generator) -> None:
    rows = raw(path, EMBEDDING)
    rows[rng.choice(TRAINED_IDS), rng.integers(rows.shape[1])] ^= np.uint8(1 << rng.integers(8))
    put(path, EMBEDDING, rows)


def flip_header(path: Path, rng: np.random.Generator) -> None:
    """Flip one bit before the data, except in free text about the file and in names of keys."""
    content = path.read_bytes()
    places = [*range(8, 24), *range(gguf_edit.keys_nbytes(path), gguf_edit.header_nbytes(path))]
    for name in GgufFile.open(path).metadata:
        if not name.startswith(("general.", "ttexport.")):
            places += range(*gguf_edit.span(path, name))
    at = int(rng.choice(places))
    poke(path, at, bytes([content[at] ^ (1 << int(rng.integers(8)))]))


def next_float(path: Path, rng: np.random.Generator) -> None:
    """A number of a trained row becomes its neighbour in float32: one unit of the last place."""
    rows = raw(path, EMBEDDING).view(np.float32)
    token_id, column = rng.choice(TRAINED_IDS), rng.integers(rows.shape[1])
    rows[token_id, column] = np.nextafter(rows[token_id, column], np.float32(np.inf))
    put(path, EMBEDDING, rows)


def swap_rows(path: Path, rng: np.random.Generator, *, trained: bool = False, parts: tuple[str, ...] = ()) -> None:
    name = pick(path, rng, *parts) if parts else EMBEDDING
    rows = raw(path, name)
    first, second = rng.choice(TRAINED_IDS if trained else len(rows), 2, replace=False)
    rows[[first, second]] = rows[[second, first]]
    put(path, name, rows)


def halves(path: Path, rng: np.random.Generator) -> None:
    """Queries or keys in the order of the checkpoint, as a converter without the permutation writes them."""
    name = pick(path, rng, "attn_q.weight", "attn_k.weight")
    rows = raw(path, name)
    put(path, name, rows.reshape(-1, 8, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape))


def transpose(path: Path, rng: np.random.Generator) -> None:
    """Transpose a square matrix."""
    name = pick(path, rng, "attn_output.weight", "attn_q.weight")
    rows = raw(path, name).view(np.uint16)
    assert rows.shape[0] == rows.shape[1]
    put(path, name, rows.T)


def scale(path: Path, rng: np.random.Generator) -> None:
    """A norm that is a little larger."""
    name = pick(path, rng, "norm.weight")
    put(path, name, raw(path, name).view(np.float32) * np.float32(1 + 10.0 ** -rng.integers(3, 6)))


def exchange(path: Path, rng: np.random.Generator) -> None:
    """Two layers get each other's matrix."""
    part = rng.choice(["attn_q", "attn_v", "ffn_up", "ffn_down"])
    first_name, second_name = (f"blk.{layer}.{part}.weight" for layer in (0, 1))
    first, second = raw(path, first_name), raw(path, second_name)
    put(path, first_name, second)
    put(path, second_name, first)


def block_scale(path: Path, rng: np.random.Generator) -> None:
    """The scale of one block of a quantised matrix, by its lowest bit."""
    name = pick(path, rng, "attn_v.weight", "ffn_up.weight", "ffn_down.weight")
    blocks = raw(path, name).reshape(-1, 34)
    blocks[rng.integers(len(blocks)), 0] ^= 1
    put(path, name, blocks)


def number(path: Path, rng: np.random.Generator, *, name: str, factors: tuple[float, ...]) -> None:
    """Another number of the same type under ``name``."""
    value = gguf_edit.values(path, name)
    changed = value * rng.choice(factors)
    key = writer.f32(name, float(changed)) if isinstance(value, float) else writer.u32(name, int(changed))
    gguf_edit.replace(path, key)


def drop(path: Path, rng: np.random.Generator, *, name: str) -> None:
    gguf_edit.remove(path, name)


def special_id(path: Path, rng: np.random.Generator) -> None:
    role = rng.choice(["bos", "eos", "padding", "unknown"])
    gguf_edit.replace(path, writer.u32(f"tokenizer.ggml.{role}_token_id", int(rng.integers(4, 512))))


def add_flag(path: Path, rng: np.random.Generator) -> None:
    gguf_edit.add(path, writer.truth(f"tokenizer.ggml.add_{rng.choice(['bos', 'eos'])}_token", True))


def swap_tokens(path: Path, rng: np.random.Generator) -> None:
    texts = gguf_edit.values(path, TOKENS)
    first, second = rng.choice(len(texts), 2, replace=False)
    texts[first], texts[second] = texts[second], texts[first]
    gguf_edit.replace(path, writer.texts(TOKENS, texts))


def rename_tokens(path: Path, rng: np.random.Generator) -> None:
    """Every other token gets the text of its neighbour."""
    texts = gguf_edit.values(path, TOKENS)
    texts[4::2], texts[5::2] = texts[5::2], texts[4::2]
    gguf_edit.replace(path, writer.texts(TOKENS, texts))


def blank_token(path: Path, rng: np.random.Generator) -> None:
    texts = gguf_edit.values(path, TOKENS)
    texts[rng.integers(4)] = ""
    gguf_edit.replace(path, writer.texts(TOKENS, texts))


def lose_token(path: Path, rng: np.random.Generator) -> None:
    gguf_edit.replace(path, writer.texts(TOKENS, gguf_edit.values(path, TOKENS)[:-1]))


def token_type(path: Path, rng: np.random.Generator) -> None:
    name = "tokenizer.ggml.token_type"
    types = gguf_edit.values(path, name)
    token_id = int(rng.choice([rng.integers(4), rng.integers(4, 512)]))
    types[token_id] = int(rng.choice([number for number in (1, 3, 4, 5, 6) if number != types[token_id]]))
    gguf_edit.replace(path, writer.i32s(name, types))


def swap_merges(path: Path, rng: np.random.Generator) -> None:
    name = "tokenizer.ggml.merges"
    merges = gguf_edit.values(path, name)
    at = rng.integers(len(merges) - 1)
    merges[at], merges[at + 1] = merges[at + 1], merges[at]
    gguf_edit.replace(path, writer.texts(name, merges))


def pre_tokenizer(path: Path, rng: np.random.Generator) -> None:
    """Another pre-tokenizer."""
    gguf_edit.replace(path, writer.text("tokenizer.ggml.pre", str(rng.choice(["smolln", "llama-bpe", ""]))))


def template(path: Path, rng: np.random.Generator) -> None:
    name = "tokenizer.chat_template"
    text = gguf_edit.values(path, name)
    at = rng.integers(len(text))
    gguf_edit.replace(path, writer.text(name, text[:at] + text[at + 1 :]))


def truncate(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: -int(rng.integers(1, len(content) // 2))])


def retype(path: Path, rng: np.random.Generator) -> None:
    """The header declares bfloat16 as float16: the same bytes are other numbers."""
    name = pick(path, rng, "ffn_up.weight", "attn_v.weight").encode()
    content = path.read_bytes()
    at = content.index(name) + len(name) + 4 + 16
    assert content[at] == 30
    poke(path, at, bytes([1]))


def architecture(path: Path, rng: np.random.Generator) -> None:
    gguf_edit.replace(path, writer.text("general.architecture", str(rng.choice(["qwen2", "granite"]))))


#: name → (artifact of the fixture, level that must catch it, damage)
GGUF: Final[Mapping[str, tuple[str, str, Damage]]] = {
    "gguf: trained row by one ulp": ("gguf_f32", "rows", next_float),
    "gguf: bit of a trained row": ("gguf", "rows", flip_trained),
    "gguf: bit of a trained row in Q8_0": ("q8_0", "rows", flip_trained),
    "gguf: two trained rows swapped": ("gguf", "rows", partial(swap_rows, trained=True)),
    "gguf: two rows swapped": ("gguf", "weights", swap_rows),
    "gguf: bit of another weight": ("gguf", "weights", flip),
    "gguf: bit of another weight in F32": ("gguf_f32", "weights", flip),
    "gguf: bit of another weight in Q8_0": ("q8_0", "weights", flip),
    "gguf: bit of the header": ("gguf", "full", flip_header),
    "gguf: rows of a matrix swapped": ("gguf", "weights", partial(swap_rows, parts=("attn_v.weight", "ffn_up.weight"))),
    "gguf: queries or keys not interleaved": ("gguf", "weights", halves),
    "gguf: square matrix transposed": ("gguf", "weights", transpose),
    "gguf: norm scaled": ("gguf_f32", "weights", scale),
    "gguf: layers exchanged": ("gguf", "weights", exchange),
    "gguf: scale of a quantised block": ("q8_0", "weights", block_scale),
    "gguf: rope base": ("gguf", "rows", partial(number, name="llama.rope.freq_base", factors=(0.5, 2, 100))),
    "gguf: rope dimensions": ("gguf", "rows", partial(number, name="llama.rope.dimension_count", factors=(0.5,))),
    "gguf: epsilon": (
        "gguf",
        "rows",
        partial(number, name="llama.attention.layer_norm_rms_epsilon", factors=(0.1, 1.5, 10)),
    ),
    "gguf: heads": ("gguf", "rows", partial(number, name="llama.attention.head_count", factors=(0.5, 2))),
    "gguf: key heads": ("gguf", "rows", partial(number, name="llama.attention.head_count_kv", factors=(0.5, 2))),
    "gguf: context": ("gguf", "rows", partial(number, name="llama.context_length", factors=(0.5, 2, 8))),
    "gguf: layers": ("gguf", "rows", partial(number, name="llama.block_count", factors=(0.5, 2))),
    "gguf: feed-forward length": ("gguf", "rows", partial(number, name="llama.feed_forward_length", factors=(0.5, 2))),
    "gguf: vocabulary size": ("gguf", "rows", partial(number, name="llama.vocab_size", factors=(0.5, 2))),
    "gguf: rope base missing": ("gemma3", "rows", partial(drop, name="gemma3.rope.freq_base")),
    "gguf: sliding window": (
        "gemma2",
        "rows",
        partial(number, name="gemma2.attention.sliding_window", factors=(0.5, 2)),
    ),
    "gguf: soft caps": ("gemma2", "rows", partial(number, name="gemma2.attn_logit_softcapping", factors=(0.5, 2))),
    "gguf: final soft cap missing": ("gemma2", "rows", partial(drop, name="gemma2.final_logit_softcapping")),
    "gguf: rope base of windows": (
        "gemma3",
        "rows",
        partial(number, name="gemma3.rope.freq_base_swa", factors=(0.5, 2)),
    ),
    "gguf: architecture": ("gguf", "rows", architecture),
    "gguf: special id": ("gguf", "rows", special_id),
    "gguf: add_bos or add_eos": ("gguf", "rows", add_flag),
    "gguf: two tokens swapped": ("gguf", "rows", swap_tokens),
    "gguf: added token blank": ("gguf", "rows", blank_token),
    "gguf: token missing": ("gguf", "rows", lose_token),
    "gguf: token type": ("gguf", "rows", token_type),
    "gguf: merges reordered": ("gguf", "rows", swap_merges),
    "gguf: pre-tokenizer": ("gguf", "full", pre_tokenizer),
    "gguf: chat template changed": ("gguf", "rows", template),
    "gguf: chat template missing": ("gguf", "rows", partial(drop, name="tokenizer.chat_template")),
    "gguf: truncated": ("gguf", "rows", truncate),
    "gguf: dtype of a tensor": ("gguf", "weights", retype),
}
