"""The checker's own tables against the lists of those that write: what is added there and missing here is named."""

from __future__ import annotations

from exporter.families import FAMILIES
from exporter.verify.gguf.layout import ARCHITECTURES as CHECKED
from exporter.verify.gguf.layout import map_tensors


def missing(checked: dict[str, str]) -> dict[str, str]:
    """Model type → architecture that the writer names in the file, where the checker has another one or none."""
    written = {name: row.llama_cpp.name for name, row in FAMILIES.items() if "gguf" in row.targets}
    return {name: arch for name, arch in written.items() if checked.get(name) != arch}


def test_the_checker_knows_every_family_that_is_written_as_gguf() -> None:
    assert missing(CHECKED) == {}, "add them to ARCHITECTURES in exporter/verify/gguf/layout.py"


def test_a_family_that_the_checker_lacks_is_named() -> None:
    assert missing({name: arch for name, arch in CHECKED.items() if name != "granite"}) == {"granite": "granite"}
    assert missing({**CHECKED, "qwen3": "qwen2"}) == {"qwen3": "qwen3"}


def test_the_head_of_a_multimodal_model_is_compared() -> None:
    for prefix in ("", "language_model.", "model.language_model."):
        assert map_tensors({f"{prefix}lm_head.weight": None}, "mistral3", 1) == (
            {"output.weight": [f"{prefix}lm_head.weight"]},
            [],
        )
