from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from exporter.errors import BadInput, NotExpressible, UsageError
from exporter.export.spec import MergeOptions
from exporter.formats.gguf.options import GgufOptions
from exporter.formats.hf.options import HfOptions
from exporter.options import Options
from exporter.release.documents.manifest import CardEntry
from exporter.release.jobs import find_job, jobs_of, matrix
from exporter.release.spec import GROUPS, read_spec
from exporter.release.tables import HubTable, ModelTable, SigningTable
from tests.release.projects import Project

Capture = pytest.CaptureFixture[str]


def text(*, models: str = '[models.one]\nadapters = ["one"]\n', rest: str = "[hf]\n", top: str = "") -> str:
    return f'name = "Lamp"\nversion = "1.0"\nbase = "org/base@v1"\n{top}{models}{rest}'


def refused(path: Path, content: str) -> str:
    path.write_text(content)
    with pytest.raises(BadInput) as caught:
        read_spec(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (text(top='basis = "x"\n'), "basis: unknown key; the most similar known key is base"),
        (text(rest='[gguf]\ntyps = ["f32"]\n'), "gguf.typs: unknown key; the most similar known key is types"),
        (text(rest="[hf]\n[onxx]\n"), "onxx: unknown key; the most similar known key is onnx"),
        (
            text(models="[models.one]\nadapter = 1\n"),
            "models.one.adapter: unknown key; the most similar known key is adapters",
        ),
        (
            text(rest='[hf]\n[card]\nlicence = "mit"\n'),
            "card.licence: unknown key; the most similar known key is license",
        ),
        (
            text(models='[models.one.card]\nlicence = "mit"\n'),
            "models.one.card.licence: unknown key; the most similar known key is license",
        ),
        (
            text(rest='[hf]\n[verify]\nlevel = "some"\n'),
            "verify.level: expected off, rows, weights, full, found 'some'",
        ),
        (text(rest='[gguf]\ntypes = "f32"\n'), "gguf.types: expected a list, found 'f32'"),
        (text(rest=""), "expected at least one of the format tables hf, gguf, gguf-lora, onnx, found no format table"),
        (text(rest="gguf = 3\n", models="models = {}\n"), "gguf: expected a table, found 3"),
        (text(rest="[hf]\n", top="untie = 1\n"), "untie: expected true or false, found 1"),
        (text(rest='[hf]\nmax-shard-size = "5"\n'), "hf.max-shard-size: expected a size such as 500M"),
        (text(rest='[gguf]\ntypes = ["f32", "F32"]\n'), "gguf.types: expected each value once, found f32, F32"),
        (text(models="[models]\n"), "models: expected at least one model, found no model"),
        (
            text(models="[models.one]\n[models.One]\n"),
            "models: expected names that are unique without regard to case, found one, One",
        ),
        (
            text(models='[models."../x"]\n'),
            "models: expected letters, digits, dots, dashes or underscores, found '../x'",
        ),
        (text(rest="[hf]\n[signing]\n"), "signing: expected exactly one of the two settings key and sigstore = true"),
        (text(rest='[hf]\n[verify]\nrequire = ["x"]\n'), "verify.require: expected llama.cpp, onnxruntime, "),
        ("name = \n", "expected valid TOML: "),
        (
            text(rest='[gguf]\ntypes = ["f32"]\nsplit-max-size = "two"\n'),
            "gguf.split-max-size: expected a size such as 500M, 2GB or 1.5GiB, found 'two'",
        ),
        (
            text(rest='[gguf]\ntypes = ["f32"]\nsplit-max-tensors = 0\n'),
            "gguf.split-max-tensors: expected a number of 1 or more, found 0",
        ),
        (
            text(rest='[gguf]\ntypes = ["Q8_0"]\noutput-tensor-type = "Q9"\n'),
            "gguf.output-tensor-type: expected a ggml type such as Q6_K or F16, found 'Q9'",
        ),
        (
            text(rest='[gguf]\ntypes = ["bf16"]\ntoken-embedding-type = "Q8_0"\n'),
            "gguf.token-embedding-type: this option needs a quantised type in gguf.types, such as Q4_K_M",
        ),
        (
            text(rest='[gguf]\ntypes = ["bf16", "Q8_0"]\nimatrix = "imatrix.gguf"\n'),
            "gguf.imatrix: an importance matrix needs a quantised type below Q8_0 in gguf.types",
        ),
    ],
)
def test_an_invalid_release_toml_is_one_line_with_file_and_key(content: str, message: str, tmp_path: Path) -> None:
    assert refused(tmp_path / "release.toml", content).startswith(message)


def test_the_page_on_releases_names_every_key() -> None:
    page = (Path(__file__).parents[2] / "docs" / "releases.md").read_text()
    section = page.partition("## Keys")[2].partition("## How it works")[0]
    structs = (ModelTable, SigningTable, HubTable, CardEntry)
    groups: list[type[Options]] = [MergeOptions, *(group for group, _ in GROUPS.values())]
    keys = {field.encode_name for struct in structs for field in msgspec.structs.fields(struct)}
    keys |= {entry.key for group in groups for entry in group.options().values()}
    assert keys - set(re.findall(r"`\[?([\w-]+)", section)) == set()


def test_a_model_cannot_have_the_name_of_a_document(undisturbed: Path, tmp_path: Path) -> None:
    documents = [path.name for path in undisturbed.iterdir() if path.is_file()]
    for name in [*documents, "model.sig", "piece.json"]:
        message = refused(tmp_path / "release.toml", text(models=f'[models."{name}"]\n[models.one]\n'))
        assert (
            message == f"models.{name}: expected a different name, because a document of the release has the same name"
        )
        (tmp_path / "release.toml").write_text(text(models=f'[models."{name}"]\n'))
        assert read_spec(tmp_path / "release.toml").models.keys() == {name}, "alone, it has no folder"


def test_a_wrong_key_is_exit_4_and_makes_nothing(project: Project, tmp_path: Path, capsys: Capture) -> None:
    project.write("one", more='basis = "x"\n')
    assert project.release(tmp_path / "out") == 4
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project"]


def test_paths_are_relative_to_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "adapters" / "one").mkdir(parents=True)
    file = tmp_path / "release.toml"
    file.write_text(text(models='[models.one]\nadapters = ["adapters/one", "org/two"]\n'))
    spec = read_spec(file)
    assert spec.models["one"].adapters == [str(tmp_path / "adapters" / "one"), "org/two"]
    assert spec.base == "org/base@v1"


@pytest.mark.parametrize("key", ["base", "adapters"])
def test_paths_that_exist_only_in_the_current_folder_are_refused(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file must not describe another release in another current folder."""
    (tmp_path / "here" / "org" / "base@v1").mkdir(parents=True)
    (tmp_path / "here" / "one").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    content = text(models="[models.one]\n") if key == "base" else text().replace("org/base@v1", "org/other")
    message = refused(tmp_path / "release.toml", content)
    assert "expected a hub id or a path relative to the folder of release.toml, found" in message
    assert message.startswith(f"{'base' if key == 'base' else 'models.one.adapters'}: ")


def test_a_release_refuses_a_file_with_encoders_alone(tmp_path: Path) -> None:
    file = tmp_path / "release.toml"
    file.write_text(text(rest="[gguf]\nmmproj = true\n"))
    with pytest.raises(NotExpressible, match=r"gguf\.mmproj: a release contains models, .*ttexport merge --mmproj"):
        jobs_of(read_spec(file))


def test_every_model_gets_every_format(tmp_path: Path) -> None:
    file = tmp_path / "release.toml"
    rest = '[hf]\ndtype = "f16"\n[gguf]\ntypes = ["BF16", "q4_k_m"]\ntoken-embedding-type = "Q8_0"\n[onnx]\n'
    file.write_text(text(models="[models.one]\n[models.two]\n", rest=rest))
    jobs = jobs_of(read_spec(file))
    assert [job.name for job in jobs if job.model == "two"] == [
        "two/hf",
        "two/gguf-bf16",
        "two/gguf-Q4_K_M",
        "two/onnx",
    ]
    assert find_job(jobs, "one/gguf-Q4_K_M").options == GgufOptions(types=("Q4_K_M",), token_embedding_type="Q8_0")
    assert find_job(jobs, "one/gguf-bf16").options == GgufOptions(dtype="bf16")
    assert find_job(jobs, "one/hf").options == HfOptions(dtype="f16")
    with pytest.raises(UsageError, match=r"--only: expected one of one/hf, .*, found 'hf'"):
        find_job(jobs, "hf")


def test_the_matrix_is_json_for_a_ci_system(project: Project, capsys: Capture) -> None:
    project.write("one", "two")
    for name in ("base", "one", "two"):
        (project.folder / name).rename(project.folder / f"no-{name}")  # a matrix needs no inputs
    assert project.release(project.folder / "out", "--matrix") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == matrix(jobs_of(read_spec(project.toml)))
    assert printed["include"][5] == {
        "job": "two/gguf-bf16",
        "piece": "two-gguf-bf16",
        "model": "two",
        "format": "gguf",
        "storage": "bf16",
    }
    assert not (project.folder / "out").exists()
