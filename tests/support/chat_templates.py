"""Checkpoints and adapters with chat templates in every place where transformers looks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

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
