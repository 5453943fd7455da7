"""Chat templates in every place where transformers looks, in base and adapter: each format has the same ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from exporter.cli.main import run
from exporter.sources.gguf.file import GgufFile

CHAT: Final[list[Any]] = [{"role": "user", "content": "Très bien 今日"}, {"role": "assistant", "content": "yes"}]
FILES: Final = ("chat_template.jinja", "chat_template.json", "processor_config.json", "preprocessor_config.json")
Layout = Mapping[str, Any]


def text(mark: str) -> str:
    turn = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    return f"{mark}{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}go{{% endif %}}"


A, B, C, D = map(text, "abcd")
PAIR: Final = {"default": A, "tool use": B}
LIST: Final = [{"name": name, "template": template} for name, template in PAIR.items()]
SEEING: Final = {"preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor"}}
SETTING: Final = "tokenizer_config.json"
JINJA: Final = "chat_template.jinja"
OLD: Final = "chat_template.json"
NAMED: Final = "additional_chat_templates/tool use.jinja"

#: (the base's files, the adapter's files or None for an adapter without a tokenizer, names and texts of transformers).
LAYOUTS: Final[dict[str, tuple[Layout, Layout | None, dict[str, str]]]] = {
    "file": ({JINJA: A}, None, {"default": A}),
    "text in the config": ({SETTING: A}, None, {"default": A}),
    "list in the config": ({SETTING: LIST}, None, PAIR),
    "dict in the config": ({SETTING: PAIR}, None, PAIR),
    "file and named": ({JINJA: A, NAMED: B}, None, PAIR),
    "named without default": ({NAMED: B}, None, {"tool use": B}),
    "file and another text in the config": ({JINJA: A, SETTING: B}, None, {"default": A}),
    "named without default and text in the config": ({NAMED: B, SETTING: A}, None, {"tool use": B}),
    "file of a processor without a processor": ({OLD: A}, None, {}),
    "file of a processor": ({OLD: A, SETTING: B, **SEEING}, None, {"default": A}),
    "text in the base's config, none in the adapter": ({SETTING: A}, {}, {"default": A}),
    "list in the base's config, none in the adapter": ({SETTING: LIST}, {}, PAIR),
    "two files": ({JINJA: A}, {JINJA: C}, {"default": C}),
    "named in the base, text in the adapter's config": ({JINJA: A, NAMED: B}, {SETTING: C}, {"default": C}),
    "text in the base's config, named in the adapter": ({SETTING: A}, {NAMED: C}, {"tool use": C}),
    "empty file in the adapter": ({JINJA: A}, {JINJA: ""}, {"default": ""}),
    "file of the base's processor, file in the adapter": ({OLD: A, **SEEING}, {JINJA: C}, {"default": C}),
    "text in the base's processor config, file in the adapter": (
        {"processor_config.json": {"chat_template": A}},
        {JINJA: C},
        {"default": C},
    ),
}


def stored(folder: Path, files: Layout) -> Path:
    """Give a folder exactly the templates ``files``: file name → text, or the value of the key chat_template."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    config = json.loads((folder / SETTING).read_text())
    config.pop("chat_template", None)
    config |= {"chat_template": files[SETTING]} if SETTING in files else {}
    (folder / SETTING).write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".jinja"):
            (folder / name).write_text(content)
        elif name != SETTING:
            (folder / name).write_text(json.dumps({"chat_template": content} if name == OLD else content))
    return folder


def by_transformers(folder: Path) -> dict[str, str]:
    """Return the templates that transformers' own loaders find: those of the processor or, if none, the tokenizer's."""
    import transformers
    from transformers.processing_utils import ProcessorMixin

    template = None
    if any((folder / name).exists() for name in FILES[2:]):
        template = ProcessorMixin.get_processor_dict(str(folder))[0].get("chat_template")
    template = template or transformers.AutoTokenizer.from_pretrained(folder).chat_template
    if template is None:
        return {}
    return {"default": template} if isinstance(template, str) else template


def by_llama_cpp(path: Path) -> dict[str, str]:
    """Return the chat as llama-cpp-python renders it with each template of a GGUF, by the name of the template."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    model = Llama(str(path), vocab_only=True, verbose=False)
    key = "tokenizer.chat_template"
    formatters = {
        name.removeprefix(key).removeprefix(".") or "default": Jinja2ChatFormatter(template, "", "")
        for name, template in model.metadata.items()
        if name.startswith(key)
    }
    return {name: formatter(messages=CHAT).prompt for name, formatter in formatters.items()}


def folders(case: str, base: Path, adapter: Path, out: Path) -> tuple[Path, Path]:
    of_base, of_adapter, _ = LAYOUTS[case]
    base = stored(Path(shutil.copytree(base, out / "base")), of_base)
    adapter = Path(shutil.copytree(adapter, out / "adapter"))
    if of_adapter is not None:
        return base, stored(adapter, of_adapter)
    for name in (*FILES, SETTING, "tokenizer.json", "special_tokens_map.json"):
        (adapter / name).unlink(missing_ok=True)
    return base, adapter


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_format_has_the_templates_of_transformers(
    case: str, tiny_tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra: llamacpp)")
    import transformers

    base, adapter = folders(case, tiny_tied, tiny_adapter, tmp_path)
    wanted = LAYOUTS[case][2]
    out = tmp_path / "out"
    argv = ["merge", str(adapter), "--base", str(base), "--to", "hf", "--to", "gguf", "--to", "onnx", "-o", str(out)]
    assert run([*argv, "--verify", "weights", "-q"]) == 0
    (gguf,) = out.rglob("*.gguf")
    (onnx,) = (path.parents[1] for path in out.rglob("model.onnx"))
    (hf,) = (path.parent for path in out.rglob("model.safetensors"))
    assert by_transformers(hf) == by_transformers(onnx) == wanted
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    rendered = {
        name.replace(" ", "_"): tokenizer.apply_chat_template(
            CHAT, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        for name, template in wanted.items()
    }
    assert by_llama_cpp(gguf) == rendered
    setting = json.loads((onnx / SETTING).read_text()).get("chat_template")
    as_dict = {entry["name"]: entry["template"] for entry in setting} if isinstance(setting, list) else setting
    assert as_dict in (wanted, wanted.get("default")), "transformers.js reads only this file"
    assert ((onnx / JINJA).exists() and (onnx / JINJA).read_text()) == wanted.get("default", False), "genai reads this"


@pytest.mark.parametrize("other", [A + " ", ""])
def test_another_template_is_found_at_every_level(
    other: str, tiny_tied: Path, tiny_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = folders("named without default", tiny_tied, tiny_adapter, tmp_path)
    out = tmp_path / "model.gguf"
    stored(base, {NAMED: other} if other else {})
    argv = ["merge", str(adapter), "--base", str(base), "--to", "gguf", "-o", str(out)]
    assert run([*argv, "--verify", "off", "-q"]) == 0
    stored(base, {NAMED: A})
    for level in ("rows", "weights"):
        argv = ["verify", str(out), "--reference", str(base), "--adapter", str(adapter), "--level", level]
        assert run(argv) == 3
        assert "chat template tool_use: expected the template of the tuned model" in capsys.readouterr().err


def test_a_folder_of_templates_without_a_default_passes_in_full(
    tiny_tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra: llamacpp)")
    base, adapter = folders("text in the base's config, named in the adapter", tiny_tied, tiny_adapter, tmp_path)
    argv = ["merge", str(adapter), "--base", str(base), "--to", "gguf", "-o", str(tmp_path / "model.gguf")]
    assert run([*argv, "--dtype", "f32", "--verify", "full", "-q"]) == 0
    assert "tokenizer.chat_template" not in GgufFile.open(tmp_path / "model.gguf").metadata


def test_names_that_become_one_name_in_a_gguf_are_refused(
    tiny_tied: Path, tiny_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = stored(Path(shutil.copytree(tiny_tied, tmp_path / "base")), {SETTING: {"tool use": A, "tool_use": B}})
    argv = ["export", str(base), "--to", "gguf", "-o", str(tmp_path / "model.gguf"), "-q"]
    assert run(argv) == 5
    assert "chat template 'tool_use': the name becomes 'tool_use'" in capsys.readouterr().err
