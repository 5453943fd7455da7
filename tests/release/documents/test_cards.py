from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from huggingface_hub import ModelCard

from exporter.errors import BadInput
from exporter.release.check import check_release
from exporter.release.documents import card, manifest, modelfile
from exporter.release.documents.manifest import FileEntry, Manifest
from exporter.release.documents.write import write_documents
from exporter.release.facts import Release
from tests.release.conftest import Drafted
from tests.release.finished import COMMIT, RUN, release

CLIENTS = {
    "hf": ["transformers"],
    "gguf": ["llama.cpp", "Ollama"],
    "onnx": ["onnxruntime-genai", "transformers.js"],
}


def built(drafted: Drafted, **changes: object) -> Manifest:
    """A manifest without files: a card must not depend on them."""
    facts: Release = replace(release(drafted.artifacts), **changes)  # type: ignore[arg-type]
    return manifest.build(facts, [])


def sections(page: str, level: str) -> list[str]:
    return [line.removeprefix(f"{level} ") for line in page.splitlines() if line.startswith(f"{level} ")]


def test_the_hub_reads_the_front_matter(finished: Path) -> None:
    data = ModelCard.load(finished / "README.md").data.to_dict()
    assert data["base_model"] == "org/tiny"
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["lamps", "ttexport", "gguf", "onnx"]


def test_the_card_lists_every_artifact_with_its_verdict(finished: Path) -> None:
    page = (finished / "README.md").read_text()
    assert f"[org/tiny](https://huggingface.co/org/tiny) at `{COMMIT}`" in page
    assert sections(page, "##") == ["Limits", "Files", "Verification", "Use"]
    rows = [line for line in page.splitlines() if "| rows | equivalent |" in line]
    assert [row.split("`")[1] for row in rows] == ["gguf/rows-BF16.gguf", "gguf/rows-Q8_0.gguf", "hf", "onnx"]


@pytest.mark.parametrize("fmt", CLIENTS)
def test_usage_examples_are_for_the_artifacts_of_the_release(finished: Path, fmt: str) -> None:
    whole, _ = manifest.read(finished / "manifest.json")
    page = card.to_bytes(whole, "tuned").decode()
    assert sections(page, "###") == [*CLIENTS["gguf"], *CLIENTS["hf"], *CLIENTS["onnx"]]
    kept = [artifact for artifact in whole.artifacts if artifact.format == fmt]
    page = card.to_bytes(msgspec.structs.replace(whole, artifacts=kept), "tuned").decode()
    assert sections(page, "###") == CLIENTS[fmt]


def test_paths_in_usage_examples_are_relative_to_the_folder_of_the_model(several: Path) -> None:
    page = (several / "tokens" / "README.md").read_text()
    [path] = [line.split()[2] for line in page.splitlines() if line.startswith("llama-cli")]
    assert (several / "tokens" / path).is_file()
    assert 'pipeline("text-generation", "./hf")' in page


def test_several_models_have_a_page_above_their_cards(several: Path) -> None:
    page = (several / "README.md").read_text()
    assert "| [Tiny rows](rows/README.md) | `rows` | gguf BF16, gguf Q8_0, hf BF16, onnx fp32 |" in page
    assert ModelCard.load(several / "README.md").data.license == "apache-2.0"
    assert check_release(several).passed


def test_a_measure_that_is_not_finite_is_recorded_by_name(drafted: Drafted) -> None:
    artifact = drafted.artifacts[0]
    report = {
        "level": "full",
        "passed": True,
        "checks": [{"name": "max abs", "passed": True, "value": 2, "limit": 3.0}],
        "facts": {"mean KL": float("nan")},
    }
    whole = built(drafted, artifacts=(replace(artifact, report=report),))
    assert whole.artifacts[0].verdict is not None
    assert whole.artifacts[0].verdict.facts == {"mean KL": "nan"}
    assert "| full | equivalent | 1 of 1 | 2.00e+00 |  |" in card.to_bytes(whole, "tuned").decode()


def test_each_model_of_a_folder_has_its_own_figures(drafted: Drafted) -> None:
    artifact = next(artifact for artifact in drafted.artifacts if artifact.format == "onnx")
    checks = [{"name": name, "passed": True, "value": None, "limit": None} for name in ("model: tie", "model_q4: tie")]
    checks.append({"name": "config", "passed": True, "value": None, "limit": None})
    facts = {"model: max abs": 1e-5, "model_q4: max abs": 4.0, "model_q4: mean KL": 0.08}
    report = {"level": "full", "passed": True, "checks": checks, "facts": facts}
    sums = {"size": 1, "sha256": "a" * 64, "kind": "model", "tensors": {}}
    files = [FileEntry(path=f"{artifact.path}/onnx/{stem}.onnx", **sums) for stem in ("model", "model_q4")]  # type: ignore[arg-type]
    whole = manifest.build(replace(release(drafted.artifacts), artifacts=(replace(artifact, report=report),)), files)
    page = card.to_bytes(whole, "tuned").decode()
    assert "| `onnx/onnx/model.onnx` | full | equivalent | 1 of 1 | 1.00e-05 |  |" in page
    assert "| `onnx/onnx/model_q4.onnx` | full | equivalent | 1 of 1 | 4.00e+00 | 8.00e-02 |" in page
    assert "| `onnx` | full | equivalent | 1 of 1 |  |  |" in page


@pytest.mark.parametrize(
    ("stems", "options"),
    [
        (("model", "model_q4", "model_sym_q4"), 'dtype: "q4"'),
        (("model", "model_sym_q4"), 'model_file_name: "model_sym", dtype: "q4"'),
    ],
)
def test_the_card_names_the_options_that_find_the_preferred_file(
    drafted: Drafted, stems: tuple[str, ...], options: str
) -> None:
    artifact = next(artifact for artifact in drafted.artifacts if artifact.format == "onnx")
    sums = {"size": 1, "sha256": "a" * 64, "kind": "model", "tensors": {}}
    files = [FileEntry(path=f"{artifact.path}/onnx/{stem}.onnx", **sums) for stem in stems]  # type: ignore[arg-type]
    whole = manifest.build(replace(release(drafted.artifacts), artifacts=(artifact,)), files)
    assert f", {{ {options} }});" in card.to_bytes(whole, "tuned").decode()


def test_the_card_states_what_was_verified(drafted: Drafted) -> None:
    artifact = drafted.artifacts[0]
    assert artifact.report is not None
    for level, sentence in (
        ("full", "from disk, run, and compared"),
        ("weights", "Every stored value of each artifact was read back from disk"),
        ("rows", "The trained rows of each artifact were read back from disk"),
    ):
        whole = built(drafted, artifacts=(replace(artifact, report={**artifact.report, "level": level}),))
        assert sentence in card.to_bytes(whole, "tuned").decode()


def test_the_card_has_each_note_once_with_its_files(drafted: Drafted) -> None:
    """llama.cpp ignores the window of some models, which readers of a card must know as those of a plan do."""
    note = "llama.cpp ignores the sliding window of this architecture, so texts of more than 8 tokens differ"
    noted = [replace(row, notes=(note,)) if row.format == "gguf" else row for row in drafted.artifacts]
    paths = [row.path for row in noted if row.notes]
    page = card.to_bytes(built(drafted, artifacts=tuple(noted)), "tuned").decode()
    assert sections(page, "##") == ["Limits", "Files", "Notes", "Verification", "Use"]
    assert page.count(note) == 1
    assert len(paths) == 2
    assert all(f"`{path}`" in page.split(note)[0].rpartition("## Notes")[2] for path in paths)


def test_the_card_states_that_an_artifact_was_not_verified(drafted: Drafted) -> None:
    whole = built(drafted, artifacts=(replace(drafted.artifacts[0], report=None),))
    page = card.to_bytes(whole, "tuned").decode()
    assert "| off | not verified |" in page
    assert "No artifact was verified." in page
    assert "was read back" not in page


@pytest.mark.parametrize("texts", [{"lisence": "mit"}, {"tags": "one"}, {"summary": 5}])
def test_unknown_texts_of_a_card_are_refused(drafted: Drafted, texts: dict[str, object], tmp_path: Path) -> None:
    facts = release(drafted.artifacts)
    models = {name: replace(model, card=texts) for name, model in facts.models.items()}
    folder = drafted.copy(tmp_path / "draft")
    with pytest.raises(BadInput, match="card"):
        write_documents(folder, replace(facts, models=models), RUN)
    assert not (folder / "README.md").exists()


def test_the_modelfile_names_the_preferred_gguf_and_its_stop_texts(several: Path) -> None:
    lines = (several / "rows" / "Modelfile").read_text().splitlines()
    assert lines[1:] == [
        "FROM ./gguf/rows-Q8_0.gguf",
        "# FROM ./gguf/rows-BF16.gguf",
        'PARAMETER stop "<|im_end|>"',
    ]


def test_a_text_that_a_modelfile_cannot_quote_is_left_out() -> None:
    texts = ["<end>", 'quo"te', "new\nline", ""]
    quoted = [list(modelfile.stops(texts, {"tokenizer.ggml.eos_token_id": token})) for token in range(len(texts) + 1)]
    assert quoted == [['"<end>"'], [], [], [], []]


def test_a_token_that_ends_both_text_and_turn_is_listed_once() -> None:
    ends = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 1}
    assert list(modelfile.stops(["<turn>", "<text>"], ends)) == ['"<text>"', '"<turn>"']


def test_a_split_gguf_has_a_usage_example_for_llama_cpp_but_not_for_ollama(drafted: Drafted, tmp_path: Path) -> None:
    gguf = next(artifact for artifact in drafted.artifacts if artifact.format == "gguf")
    folder = tmp_path / "draft"
    (folder / "gguf").mkdir(parents=True)
    parts = [folder / "gguf" / f"rows-0000{number}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        part.write_bytes((drafted.folder / gguf.path).read_bytes())
    path = parts[0].relative_to(folder).as_posix()
    write_documents(folder, release((replace(gguf, path=path),)), RUN)
    page = (folder / "README.md").read_text()
    assert sections(page, "###") == ["llama.cpp"]
    assert not (folder / "Modelfile").exists()
    size = sum(part.stat().st_size for part in parts) / 1e6
    assert f"| `{path}` | gguf | {gguf.storage} | {size:.1f} |" in page


def test_python_in_a_card_compiles(finished: Path) -> None:
    page = (finished / "README.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")


@pytest.mark.parametrize("client", ["transformers", "onnxruntime_genai"])
def test_the_client_runs_as_the_card_says(finished: Path, client: str) -> None:
    page = (finished / "README.md").read_text()
    code = next(block for block in page.split("```python\n")[1:] if client in block).split("```")[0]
    code = code.replace("max_new_tokens=64", "max_new_tokens=2").replace("max_length=128", "max_length=16")
    done = subprocess.run([sys.executable, "-c", code], cwd=finished, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Hello" in done.stdout


def test_a_token_in_a_note_is_no_html_tag_in_the_card(drafted: Drafted) -> None:
    note = "llama.cpp ends generation at '<EOT>' (id 5) because of the text, but transformers does not"
    artifacts = tuple(replace(artifact, notes=(note,) * (artifact.format == "gguf")) for artifact in drafted.artifacts)
    page = card.to_bytes(manifest.build(release(artifacts), []), "tuned").decode()
    (line,) = (line for line in page.splitlines() if "ends generation" in line)
    assert line.startswith("- `gguf/rows-BF16.gguf`, `gguf/rows-Q8_0.gguf`: llama.cpp ends generation at '&lt;EOT>'")
