from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from exporter.cli.main import run
from exporter.merge.passes import ReplaceRows
from exporter.release import find_job, plan_release, read_spec, run_release
from fixtures.peft_adapters import RECIPES, build_adapter
from tests.release.projects import RUN, Project, contents, jobs_of, methods
from tests.support.documents import read_report

GGUF_ALL = '[gguf]\ntypes = ["f32", "bf16", "Q8_0", "Q4_K_M", "Q6_K"]\n'


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_single_model_is_at_the_top_with_conventional_names(project: Project, tmp_path: Path) -> None:
    assert project.write("one").release(tmp_path / "out") == 0
    out = tmp_path / "out"
    assert names(out) == [
        "Modelfile",
        "README.md",
        "SHA256SUMS",
        "gguf",
        "hf",
        "manifest.json",
        "onnx",
        "provenance.intoto.json",
        "report.json",
        "run.json",
    ]
    assert names(out / "gguf") == ["Lamp-107K-BF16.gguf", "Lamp-107K-Q8_0.gguf"]
    assert run(["verify", str(out), "-q"]) == 0


def test_several_models_have_a_folder_each(undisturbed: Path) -> None:
    assert {"one", "two"} <= set(names(undisturbed))
    assert names(undisturbed / "two" / "gguf") == ["Lamp-107K-two-BF16.gguf", "Lamp-107K-two-Q8_0.gguf"]
    assert run(["verify", str(undisturbed), "-q"]) == 0


def test_the_same_inputs_in_another_folder_give_the_same_bytes(
    project: Project, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "elsewhere"
    assert project.write("one", "two").release(out) == 0
    assert contents(out) == contents(undisturbed)
    assert (out / RUN).read_bytes() != (undisturbed / RUN).read_bytes()


def test_no_file_contains_a_local_path(undisturbed: Path) -> None:
    for path in undisturbed.rglob("*"):
        assert not path.is_file() or str(undisturbed.parent.parent).encode() not in path.read_bytes(), path


def test_a_cold_and_a_warm_cache_give_the_same_bytes(project: Project, undisturbed: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    project.write("one", "two")
    for name in ("cold", "warm"):
        assert project.release(tmp_path / name, cache=cache) == 0
        assert contents(tmp_path / name) == contents(undisturbed)
    assert methods(tmp_path / "cold")["one/gguf-Q8_0"] == "converted, patched"
    assert methods(tmp_path / "warm")["one/gguf-Q8_0"] == "patched"


def test_the_second_adapter_patches_what_the_first_one_converted(undisturbed: Path) -> None:
    used = methods(undisturbed)
    jobs = ("gguf-bf16", "gguf-Q8_0", "onnx")
    assert {used[f"one/{job}"] for job in jobs} == {"converted, patched"}
    assert {used[f"two/{job}"] for job in jobs} == {"patched"}


def test_released_files_equal_those_of_a_merge(project: Project, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert project.write("one", formats=f"[hf]\n{GGUF_ALL}[onnx]\nprecisions = ['fp32', 'int4']\n").release(out) == 0
    arguments = ["merge", str(project.folder / "one"), "--base", str(project.folder / "base"), "-q"]
    merged = tmp_path / "merged"
    quants = [argument for quant in ("Q8_0", "Q4_K_M", "Q6_K", "fp32", "int4") for argument in ("--quant", quant)]
    assert run([*arguments, "--to", "hf", "--to", "gguf", "--to", "onnx", *quants, "-o", str(merged)]) == 0
    for dtype in ("f32", "bf16"):
        file = merged / "gguf" / f"one-{dtype.upper()}.gguf"
        assert run([*arguments, "--to", "gguf", "--dtype", dtype, "-o", str(file)]) == 0
    for place in ("hf", "onnx"):
        assert contents(out / place) == contents(merged / place)
    types = ["F32", "BF16", "Q8_0", "Q4_K_M", "Q6_K"]
    expected = {name: (merged / "gguf" / f"one-{name}.gguf").read_bytes() for name in types}
    assert {name: (out / "gguf" / f"Lamp-107K-{name}.gguf").read_bytes() for name in types} == expected


def test_an_adapter_with_more_than_rows_is_merged(project: Project, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(project.folder / "base")
    build_adapter(model, project.folder / "lora", "llama", RECIPES["lora and rows"])
    out, cache = tmp_path / "out", tmp_path / "cache"
    assert project.write("lora", formats=GGUF_ALL).release(out, cache=cache) == 0
    assert set(methods(out).values()) == {"merged"}
    assert not (cache / "artifacts").exists(), "merged artifacts are not cached"
    merged = tmp_path / "merged.gguf"
    arguments = ["merge", str(project.folder / "lora"), "--base", str(project.folder / "base"), "--to", "gguf"]
    assert run([*arguments, "--quant", "Q4_K_M", "-q", "-o", str(merged)]) == 0
    assert next((out / "gguf").glob("*Q4_K_M.gguf")).read_bytes() == merged.read_bytes()


def test_new_tokens_are_patched_in(project: Project, tiny_new_tokens_adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_new_tokens_adapter, project.folder / "new")
    out = tmp_path / "out"
    assert project.write("new").release(out) == 0
    assert methods(out)["gguf-Q8_0"] == "converted, patched"
    merged = tmp_path / "merged.gguf"
    arguments = ["merge", str(project.folder / "new"), "--base", str(project.folder / "base"), "--to", "gguf"]
    assert run([*arguments, "--quant", "Q8_0", "-q", "-o", str(merged)]) == 0
    assert next((out / "gguf").glob("*Q8_0.gguf")).read_bytes() == merged.read_bytes()


def test_a_model_without_adapters_is_the_base_itself(project: Project, tmp_path: Path) -> None:
    project.write("one", formats="[hf]\n")
    project.toml.write_text(project.toml.read_text().replace('["one"]', "[]"))
    assert project.release(tmp_path / "out") == 0
    weights = (tmp_path / "out" / "hf" / "model.safetensors").read_bytes()
    assert weights == (project.folder / "base" / "model.safetensors").read_bytes()


def test_files_are_split_at_the_given_limit(project: Project, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert project.write("one", formats='[gguf]\ntypes = ["Q8_0"]\nsplit-max-tensors = 10\n').release(out) == 0
    assert names(out / "gguf") == [f"Lamp-107K-Q8_0-0000{number}-of-00002.gguf" for number in (1, 2)]
    assert run(["verify", str(out), "-q"]) == 0


@pytest.mark.slow
def test_every_artifact_is_run_before_the_release_gets_its_name(project: Project, tmp_path: Path) -> None:
    formats = '[hf]\n[gguf]\ntypes = ["f32"]\n[onnx]\nprecisions = ["fp32"]\n'
    out = tmp_path / "out"
    assert project.write("one", formats=formats, verify="").release(out) == 0
    report = read_report(out)
    assert [entry["level"] for entry in report["artifacts"]] == ["full"] * 3
    assert report["passed"]
    assert {entry["facts"]["runtime"] for entry in report["artifacts"]} == {"transformers", "llama.cpp", "ONNX Runtime"}
    pieces = tmp_path / "pieces"
    for job in ("hf", "gguf-f32", "onnx"):
        assert project.release(pieces / job, "--only", job) == 0
    assert project.release(tmp_path / "joined", "--assemble", pieces) == 0
    assert contents(tmp_path / "joined") == contents(out), "verified one by one, the figures are the same"


def test_a_failed_verification_publishes_nothing_and_names_the_report(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    project.write("one")
    with monkeypatch.context() as patch:
        patch.setattr(ReplaceRows, "apply", lambda self, start, value: value)
        assert project.release(out) == 3
    stderr = capsys.readouterr().err
    report = tmp_path / ".out.partial" / "report.json"
    assert stderr.startswith("ttexport: hf: hf: not equivalent: ")
    assert stderr.endswith(f"no release was published; for details, see {report}\n")
    assert not out.exists()
    assert [entry["passed"] for entry in read_report(report.parent)["artifacts"]] == [False, True, True, True]
    assert project.release(out, "--resume") == 3, "the wrong artifact is kept"
    assert project.release(out, "--force") == 0
    assert names(tmp_path) == ["out", "project"]


def test_the_same_in_python(project: Project, undisturbed: Path, tmp_path: Path) -> None:
    plan = plan_release(read_spec(project.write("one", "two").toml))
    assert [job.name for job in plan.jobs][:4] == ["one/hf", "one/gguf-bf16", "one/gguf-Q8_0", "one/onnx"]
    made = run_release(plan, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(undisturbed)
    assert {artifact.job for artifact in made.artifacts} == set(jobs_of(tmp_path / "out"))
    run_release(plan, tmp_path / "piece", only=find_job(plan.jobs, "two/hf"))
    assert json.loads((tmp_path / "piece" / "piece.json").read_text())["made"]["job"] == "two/hf"


@pytest.mark.parametrize("source", ["missing/one/there", "org/absent", "a" * 5000], ids=["path", "hub id", "too long"])
@pytest.mark.parametrize(
    ("key", "line"), [("base", 'base = "base"'), ("models.one.adapters", 'adapters = ["one"]')], ids=["base", "adapter"]
)
def test_a_missing_input_is_exit_4_with_file_and_key(
    key: str, line: str, source: str, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write("one", formats="[hf]\n")
    toml = project.toml.rename(project.folder / "lamp.toml")
    text = toml.read_text()
    assert line in text
    toml.write_text(text.replace(line, line.replace('"base"' if key == "base" else '"one"', f'"{source}"')))
    assert run(["release", str(toml), "-q", "--no-cache", "-o", str(tmp_path / "out")]) == 4
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"ttexport: {toml}: {key}: ")
    assert stderr.count("\n") == 1
    assert names(tmp_path) == ["project"]


def test_force_does_not_replace_inputs(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.write("one")
    for out in (project.folder, project.folder / "base"):
        assert project.release(out, "--force") == 2
        assert "an output path that overwrites no input" in capsys.readouterr().err
    assert (project.folder / "base" / "config.json").exists()
