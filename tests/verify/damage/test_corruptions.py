"""The mutation score: every kind of damage, at places chosen by seeds, is exit 3 or 4. A survivor is a bug."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from exporter.cli.main import run
from exporter.verify.expect.reference import Reference
from exporter.verify.run import verify
from fixtures import adapters
from fixtures.models import families
from tests.support.processes import ttexport
from tests.support.trained import TRAINED_IDS
from tests.verify.damage import mutants_hf, mutants_onnx
from tests.verify.damage.mutants_gguf import GGUF
from tests.verify.damage.mutants_hf import HF, Damage
from tests.verify.damage.mutants_onnx import ONNX
from tests.verify.subjects import Subject, make

SEEDS = (0, 1, 2)
Table = Mapping[str, tuple[str, str, Damage]]


@pytest.fixture(scope="session")
def subjects(
    tiny_tied: Path, tiny_sharded: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Subject]:
    out = tmp_path_factory.mktemp("subjects")
    rows = adapters.stock_rows(tiny_sharded, out / "rows", TRAINED_IDS)
    by_name = {
        "hf": make(tiny_tied, tiny_adapter, out / "hf"),
        "hf_sharded": make(tiny_sharded, rows, out / "hf-sharded"),
        "gguf": make(tiny_tied, tiny_adapter, out / "bf16.gguf", "--to", "gguf"),
        "gguf_f32": make(tiny_tied, tiny_adapter, out / "f32.gguf", "--to", "gguf", "--dtype", "f32"),
        "q8_0": make(tiny_tied, tiny_adapter, out / "q8_0.gguf", "--to", "gguf", "--quant", "Q8_0"),
        "onnx": make(tiny_tied, tiny_adapter, out / "onnx", "--to", "onnx"),
        "onnx_fp16": make(tiny_tied, tiny_adapter, out / "fp16", "--to", "onnx", "--dtype", "f16"),
        "onnx_int4": make(tiny_tied, tiny_adapter, out / "int4", "--to", "onnx", "--quant", "int4"),
    }
    for short, name in (("gemma2", "gemma2"), ("gemma3", "gemma3_text")):
        base = families.build(name, out / name)
        own_rows = adapters.stock_rows(base, out / f"{name}-rows", TRAINED_IDS)
        by_name[short] = make(base, own_rows, out / f"{name}.gguf", "--to", "gguf")
    return by_name


def digest(artifact: Path) -> str:
    files = sorted(path for path in artifact.rglob("*") if path.is_file()) if artifact.is_dir() else [artifact]
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def damaged(subject: Subject, damage: Damage, seed: int, out: Path) -> Path:
    """A copy of the artifact with the damage."""
    rng = np.random.default_rng(seed)
    copy = out / subject.path.name
    for _ in range(20):
        if subject.path.is_dir():
            shutil.copytree(subject.path, copy, dirs_exist_ok=True)
        else:
            out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(subject.path, copy)
        damage(copy, rng)
        if digest(copy) != digest(subject.path):
            return copy
    raise AssertionError("the damage changes nothing")


def mutants(table: Table, base: Path) -> dict[str, tuple[str, str, Damage]]:
    stale = {
        "hf: stale head": ("hf", "rows", mutants_hf.stale_head(base)),
        "onnx: stale head": ("onnx", "rows", mutants_onnx.stale_head(base)),
    }
    (format_,) = {name.partition(":")[0] for name in table}
    return dict(table) | {name: mutant for name, mutant in stale.items() if name.startswith(format_)}


def survivors(
    table: Table, subjects: Mapping[str, Subject], out: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[str]:
    for number, (name, (artifact, level, damage)) in enumerate(table.items()):
        for seed in SEEDS:
            copy = damaged(subjects[artifact], damage, seed, out / f"{number}-{seed}")
            code = run(subjects[artifact].argv(copy, level))
            error = capsys.readouterr().err
            if code not in (3, 4) or error.count("\n") != 1:
                yield f"{name}, seed {seed}: exit {code}: {error[:300]}"
            shutil.rmtree(out / f"{number}-{seed}")


@pytest.mark.parametrize("table", [GGUF, HF, ONNX], ids=["gguf", "hf", "onnx"])
def test_every_corruption_is_caught_without_running_a_model(
    table: Table, subjects: dict[str, Subject], tiny_tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {name: mutant for name, mutant in mutants(table, tiny_tied).items() if mutant[1] != "full"}
    for artifact in {mutant[0] for mutant in cases.values()}:
        assert run(subjects[artifact].argv(subjects[artifact].path, "weights")) == 0, "the artifact is sound"
    alive = list(survivors(cases, subjects, tmp_path, capsys))
    count = len(cases) * len(SEEDS)
    print(f"mutation score: {count - len(alive)} of {count} caught, {len(cases)} kinds of damage")
    assert alive == []


def test_damage_that_only_running_shows_is_caught_by_running(
    subjects: dict[str, Subject], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference runs once. Mutants that fail without running are not run, and equal mutants run once."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra: llamacpp)")
    clean = [subjects[artifact].path for artifact in ("gguf", "onnx")]
    mutants: dict[str, Path] = {}
    caught = 0
    for artifact, level, damage in {**GGUF, **ONNX}.values():
        for seed in SEEDS if level == "full" else ():
            copy = damaged(subjects[artifact], damage, seed, tmp_path / f"{len(mutants)}-{seed}-{caught}")
            if run(subjects[artifact].argv(copy, "weights")) in (3, 4):
                caught += 1
            else:
                mutants.setdefault(digest(copy), copy)
    capsys.readouterr()
    subject = subjects["gguf"]
    reports = verify([*clean, *mutants.values()], Reference.open(subject.base, [subject.adapter]), level="full")
    assert [report.failures for report in reports[: len(clean)]] == [[], []]
    assert [report.artifact for report in reports[len(clean) :] if report.passed] == []
    print(f"mutation score: {caught} of {caught} without running, {len(mutants)} of {len(mutants)} by running")


@pytest.mark.parametrize(
    ("name", "code"),
    [("gguf: token type", 3), ("gguf: truncated", 4), ("hf: shard missing", 4), ("onnx: rotary table", 3)],
)
def test_a_whole_process_reports_in_one_line(
    name: str, code: int, subjects: dict[str, Subject], tmp_path: Path
) -> None:
    artifact, level, damage = {**GGUF, **HF, **ONNX}[name]
    copy = damaged(subjects[artifact], damage, 0, tmp_path)
    ended = ttexport(*subjects[artifact].argv(copy, level))
    assert (ended.code, ended.stderr.count("\n")) == (code, 1)
