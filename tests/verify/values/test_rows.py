"""Faults in the weights are found on disk, without running a model, and are exit 3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.cli.main import run
from tests.support.trained import TRAINED_IDS
from tests.verify.conftest import Tuned
from tests.verify.damage import corruptions

Fault = Callable[[Path, Tuned], None]
UNTRAINED = 201
EMBEDDING = "token_embd.weight"
ROWS = "embedding rows"

#: fault → (artifact, function that makes it, check that must fail)
FAULTS: dict[str, tuple[str, Fault, str]] = {
    "gguf trained row": ("gguf", lambda p, t: corruptions.gguf_row_to_base(p, t.base, TRAINED_IDS[0]), ROWS),
    "gguf f32 trained row": (
        "gguf_f32",
        lambda p, t: corruptions.gguf_row_to_base(p, t.base, TRAINED_IDS[1]),
        ROWS,
    ),
    "q8_0 one bit": ("q8_0", lambda p, t: corruptions.gguf_flip(p, EMBEDDING, TRAINED_IDS[0] * 68 + 9), ROWS),
    "hf trained row": ("hf", lambda p, t: corruptions.hf_row_to_base(p, t.base, TRAINED_IDS[2]), ROWS),
    "hf stale head": ("hf", lambda p, t: corruptions.hf_stale_head(p, t.base), "tie"),
    "hf config": ("hf", lambda p, t: corruptions.hf_config(p, rms_norm_eps=1e-3), "config"),
    "hf untied flag": ("hf", lambda p, t: corruptions.hf_config(p, tie_word_embeddings=False), "config"),
    "hf vocab": ("hf", lambda p, t: corruptions.hf_config(p, vocab_size=513), "config"),
    "onnx trained row": ("onnx", lambda p, t: corruptions.onnx_row_to_base(p, t.base, TRAINED_IDS[0]), ROWS),
    "onnx stale head": ("onnx", lambda p, t: corruptions.onnx_stale_head(p, t.base), "tie"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_weights_is_exit_3(
    name: str, tuned: Tuned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, corrupt, check = FAULTS[name]
    broken = corruptions.copy(getattr(tuned, artifact), tmp_path)
    assert run([*tuned.argv(broken), "--level", "rows"]) == 0, "the copy was sound before"
    corrupt(broken, tuned)
    assert run([*tuned.argv(broken), "--level", "rows"]) == 3
    error = capsys.readouterr().err
    assert check in error
    assert broken.name in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("artifact", ["hf", "gguf", "gguf_f32", "q8_0", "onnx"])
def test_a_flipped_bit_in_an_untrained_row_is_found_when_every_row_is_read(
    artifact: str, tuned: Tuned, tmp_path: Path
) -> None:
    from exporter.verify.expect.reference import Reference
    from exporter.verify.stored.artifact import open_artifacts
    from exporter.verify.values.rows import check_rows

    broken = corruptions.copy(getattr(tuned, artifact), tmp_path)
    reference = Reference.open(tuned.base, [tuned.adapter])

    def untouched() -> bool:
        checks = check_rows(open_artifacts(broken)[0], reference, untouched=True)
        return next(check for check in checks if check.name == "embedding untouched").passed

    assert untouched()
    if artifact == "hf":
        corruptions.hf_flip(broken, "model.embed_tokens.weight", UNTRAINED * 128 + 6)
    elif artifact == "onnx":
        corruptions.onnx_row_to_base(broken, tuned.base, TRAINED_IDS[0])  # this check ignores trained rows
        assert untouched()
        data = broken / "onnx" / "model.onnx_data"
        from exporter.sources.onnx.file import OnnxFile

        file = OnnxFile.open(broken)
        place = file.initialisers[str(file.embedding)].place
        assert place
        at = place.offset_bytes + UNTRAINED * 256 + 6
        corruptions.poke(data, at, bytes([data.read_bytes()[at] ^ 1]))
    else:
        row = {"gguf": 128, "gguf_f32": 256, "q8_0": 68}[artifact]
        corruptions.gguf_flip(broken, "token_embd.weight", UNTRAINED * row + 6)
    assert not untouched()


def test_a_flipped_bit_in_another_tensor_of_a_checkpoint_is_found(tuned: Tuned, tmp_path: Path) -> None:
    from exporter.verify.expect.reference import Reference
    from exporter.verify.folder.checkpoint import check_checkpoint

    broken = corruptions.copy(tuned.hf, tmp_path)
    reference = Reference.open(tuned.base, [tuned.adapter])
    assert all(check.passed for check in check_checkpoint(broken, reference, untouched=True))
    corruptions.hf_flip(broken, "model.layers.1.mlp.up_proj.weight", 4001)
    failed = [check.name for check in check_checkpoint(broken, reference, untouched=True) if not check.passed]
    assert failed == ["other tensors"]


def test_the_wrong_adapter_is_not_equivalent(tuned: Tuned, tmp_path: Path) -> None:
    from fixtures.adapters import stock_rows

    other = stock_rows(tuned.base, tmp_path / "other", TRAINED_IDS, seed=99)
    assert (
        run(
            [
                "verify",
                str(tuned.gguf),
                "--reference",
                str(tuned.base),
                "--adapter",
                str(other),
                "--level",
                "rows",
                "-q",
            ]
        )
        == 3
    )


def test_no_adapter_at_all_is_not_equivalent_once_every_row_is_read(tuned: Tuned) -> None:
    from exporter.verify.expect.reference import Reference
    from exporter.verify.stored.artifact import open_artifacts
    from exporter.verify.values.rows import check_rows

    checks = list(check_rows(open_artifacts(tuned.hf)[0], Reference.open(tuned.base, []), untouched=True))
    assert not next(check for check in checks if check.name == "embedding untouched").passed


def test_an_untied_model_must_keep_its_head(tiny_untied: Path, tiny_both_adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    assert run(["merge", str(tiny_both_adapter), "--base", str(tiny_untied), "-o", str(out), "-q"]) == 0
    argv = [
        "verify",
        str(out),
        "--reference",
        str(tiny_untied),
        "--adapter",
        str(tiny_both_adapter),
        "--level",
        "rows",
        "-q",
    ]
    assert run(argv) == 0
    corruptions.hf_flip(out, "lm_head.weight", TRAINED_IDS[0] * 128 + 7)
    assert run(argv) == 3


@pytest.mark.parametrize("removed", [1, 5000])
def test_a_truncated_artifact_is_bad_input(
    removed: int, tuned: Tuned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for artifact, name in (("gguf", ""), ("hf", "model.safetensors"), ("onnx", "onnx/model.onnx_data")):
        broken = corruptions.copy(
            getattr(tuned, artifact), tmp_path / f"{artifact}{removed}" if artifact != "gguf" else tmp_path
        )
        file = broken / name if name else broken
        file.write_bytes(file.read_bytes()[:-removed])
        assert run([*tuned.argv(broken), "--level", "rows"]) == 4
        error = capsys.readouterr().err
        assert file.name in error
        assert error.count("\n") == 1


def test_rows_of_no_adapter_prove_nothing(tuned: Tuned, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --adapter, level rows must not report that the artifact equals the base."""
    assert run(["verify", str(tuned.hf), "--reference", str(tuned.base), "--level", "rows"]) == 2
    assert "requires --adapter" in capsys.readouterr().err
    assert run(["verify", str(tuned.hf), "--reference", str(tuned.base), "--level", "weights", "-q"]) == 3
