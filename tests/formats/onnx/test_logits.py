"""ONNX Runtime computes transformers' logits, for all patterns of inputs that clients use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from exporter.tensors import Array
from exporter.verify.runtimes.onnx_runtime import Session, compute
from fixtures.corpus import LINES
from tests.formats.onnx import reference
from tests.formats.onnx.conftest import Change, Write, random_ids

#: fp32 kernels sum in another order. Measured worst on these models: 1e-5.
TINY_MAX_ABS = 3e-5
#: The contract. Measured: 1.3e-4; transformers' own float32 is up to 8e-5 from its float64 on such texts.
SMOLLM2_MAX_ABS = 2e-4

SEQUENCES = [random_ids(40, 512, 0), random_ids(13, 512, 1), random_ids(1, 512, 2), random_ids(27, 512, 3)]


def worst(got: Sequence[Array], want: Sequence[Array]) -> float:
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in zip(got, want, strict=True))


def modes(folder: Path, sequences: Sequence[Sequence[int]]) -> Mapping[str, list[Array]]:
    """Pattern of inputs → logits: a full pass, token by token, padded batches, several tokens per call."""
    saved: dict[str, Array] = {}
    job = {
        "artifact": folder / "onnx" / "model.onnx",
        "sequences": sequences,
        "more": [],
        "greedy_prompts": [],
        "greedy_tokens": 0,
    }
    compute(job | {"modes": ["full", "cached", "padded"], "cache_shape": (0, 0)}, saved.__setitem__)
    count = range(len(sequences))
    out = {mode: [saved[f"{mode}.{number}"] for number in count] for mode in ("full", "cached", "padded")}
    return out | {"right": right_padded(folder, sequences), "several": several_tokens(folder, sequences)}


def right_padded(folder: Path, sequences: Sequence[Sequence[int]]) -> list[Array]:
    session = Session(folder / "onnx" / "model.onnx")
    longest = max(map(len, sequences))
    ids, mask = np.zeros((2, len(sequences), longest), np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    logits, cache = session.run(ids, mask, positions, session.empty_cache(len(sequences)))
    assert np.isfinite(logits).all()
    assert all(np.isfinite(value).all() for value in cache.values())
    return [logits[row, : len(sequence)] for row, sequence in enumerate(sequences)]


def several_tokens(folder: Path, sequences: Sequence[Sequence[int]]) -> list[Array]:
    """Several tokens per call after a filled cache."""
    session = Session(folder / "onnx" / "model.onnx")
    out = []
    for sequence in sequences:
        cache, parts = session.empty_cache(1), []
        for start in range(0, len(sequence), 7):
            ids = np.array([sequence[start : start + 7]], np.int64)
            stop = start + ids.shape[1]
            logits, cache = session.run(ids, np.ones((1, stop), np.int64), np.arange(start, stop)[None], cache)
            parts.append(logits[0])
        out.append(np.concatenate(parts))
    return out


def assert_same(folder: Path, want: list[Array], sequences: Sequence[Sequence[int]], limit: float) -> None:
    errors = {mode: worst(logits, want) for mode, logits in modes(folder, sequences).items()}
    assert max(errors.values()) <= limit, errors


@pytest.mark.parametrize("ops", ["standard", "ort"])
@pytest.mark.parametrize("name", ["tiny_tied", "tiny_untied", "tiny_sharded", "tiny_padded"])
def test_every_pattern_of_inputs_gives_the_logits_of_transformers(
    write: Write, request: pytest.FixtureRequest, name: str, ops: str
) -> None:
    base = request.getfixturevalue(name)
    assert_same(write(base, ops=ops), reference.logits(reference.load(base), SEQUENCES), SEQUENCES, TINY_MAX_ABS)


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        ("tiny_tied", "tiny_adapter"),
        ("tiny_untied", "tiny_untied_adapter"),
        ("tiny_untied", "tiny_both_adapter"),
        ("tiny_tied", "tiny_new_tokens_adapter"),
    ],
)
def test_merged_rows_give_the_logits_of_unmerged_peft(
    write: Write, request: pytest.FixtureRequest, base: str, adapter: str
) -> None:
    folders = request.getfixturevalue(base), request.getfixturevalue(adapter)
    sequences = [[300, 17, 2, 511, 300], *SEQUENCES[:2]]
    if adapter == "tiny_new_tokens_adapter":
        sequences.append([512, 513, 514, 300])
    assert_same(write(*folders), reference.logits(reference.load(*folders), sequences), sequences, TINY_MAX_ABS)


def test_base_without_the_rows_does_not_pass_for_the_merged_model(
    write: Write, tiny_tied: Path, tiny_adapter: Path
) -> None:
    want = reference.logits(reference.load(tiny_tied, tiny_adapter), SEQUENCES)
    assert worst(modes(write(tiny_tied), SEQUENCES)["full"], want) > 100 * TINY_MAX_ABS


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0} | {
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3, YARN], ids=["linear", "llama3", "yarn"])
@pytest.mark.parametrize("ops", ["standard", "ort"])
def test_scaled_rope_holds_up_to_the_last_position(
    write: Write, change: Change, tiny_tied: Path, rope: dict[str, object], ops: str
) -> None:
    base = change(tiny_tied, rope_parameters=rope)
    sequences = [random_ids(512, 512), random_ids(100, 512, 1)]
    want = reference.logits(reference.load(base), sequences)
    plain = reference.logits(reference.load(tiny_tied), sequences)
    assert worst(plain, want) > 0.1  # the scaling has an effect
    folder = write(base, ops=ops)
    session = Session(folder / "onnx" / "model.onnx")
    got = []
    for ids in sequences:
        positions = np.arange(len(ids))[None]
        mask = np.ones_like(positions)
        got.append(session.run(np.array([ids]), mask, positions, session.empty_cache(1))[0][0])
    assert worst(got, want) <= TINY_MAX_ABS


def test_biases_are_used_where_the_checkpoint_has_them(write: Write, change: Change, tiny_untied: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    with safe_open(tiny_untied / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # not a mapping
    biases = {
        name.replace(".weight", ".bias"): torch.randn(shape[0], generator=generator).mul(0.3).to(torch.bfloat16)
        for name, shape in shapes.items()
        if name.endswith("_proj.weight")
    }
    base = change(tiny_untied, tensors=biases, attention_bias=True, mlp_bias=True)
    want = reference.logits(reference.load(base), SEQUENCES)
    assert worst(reference.logits(reference.load(tiny_untied), SEQUENCES), want) > 0.1
    assert_same(write(base), want, SEQUENCES, TINY_MAX_ABS)


def test_head_width_from_the_config(write: Write, change: Change, tiny_tied: Path) -> None:
    """Head_dim 8 while hidden / heads is 16, so eight heads read the same matrices."""
    base = change(tiny_tied, head_dim=8, num_attention_heads=8, num_key_value_heads=4)
    assert_same(write(base), reference.logits(reference.load(base), SEQUENCES), SEQUENCES, TINY_MAX_ABS)


@pytest.mark.parametrize("ops", ["standard", "ort"])
@pytest.mark.parametrize("quant", ["fp32", "fp16"])
def test_padding_of_any_length_leaves_no_nan(write: Write, tiny_tied: Path, quant: str, ops: str) -> None:
    session = Session(next((write(tiny_tied, quants=(quant,), ops=ops) / "onnx").glob("*.onnx")))
    mask = np.array([[0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]])
    logits, _ = session.run(np.full((3, 4), 9), mask, np.zeros((3, 4), np.int64), session.empty_cache(3))
    assert np.isfinite(logits).all()


@pytest.mark.smollm2
def test_smollm2_with_trained_rows(write: Write, smollm2: Path, smollm2_adapter: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [" ".join(LINES[start : start + 4]) for start in (0, 4)]
    sequences = [list(tokenizer(text)["input_ids"])[:48] for text in texts]
    sequences.append([2, 33, 1042, 40001, 33, 2])
    want = reference.logits(reference.load(smollm2, smollm2_adapter), sequences)
    assert_same(write(smollm2, smollm2_adapter), want, sequences, SMOLLM2_MAX_ABS)
