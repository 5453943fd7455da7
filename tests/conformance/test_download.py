from __future__ import annotations

import re

from tests.conformance.download import REQUIREMENT
from tests.tiers.imports import ROOT


def test_the_converter_comes_with_the_llama_cpp_that_is_installed() -> None:
    [pinned] = re.findall(
        r"^llama-cpp-python==(\S+) --hash=sha256:[0-9a-f]{64}$", REQUIREMENT.read_text(), re.MULTILINE
    )
    assert f"\nllama-cpp-python=={pinned}\n" in (ROOT / "constraints.txt").read_text()
