"""What llama.cpp calls the parts of a decoder.

Source: gguf-py's tensor names, and docs/gguf.md for the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from exporter.errors import NotExpressible
from exporter.families.spec import Role, Slot

_OUTSIDE: Final[Mapping[Role, str]] = {
    Role.EMBED: "token_embd",
    Role.FINAL_NORM: "output_norm",
    Role.HEAD: "output",
}
_LAYER: Final[Mapping[Role, str]] = {
    Role.ATTN_NORM: "attn_norm",
    Role.Q: "attn_q",
    Role.K: "attn_k",
    Role.V: "attn_v",
    Role.ATTN_OUT: "attn_output",
    Role.MLP_NORM: "ffn_norm",
    Role.GATE: "ffn_gate",
    Role.UP: "ffn_up",
    Role.DOWN: "ffn_down",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """How llama.cpp names a family, and whether it pairs neighbouring dimensions in rotary embedding.

    interleaved: rows of q and k change from the Hugging Face order (i with i + dims/2) to pairs (2i with 2i + 1).
    """

    name: str
    interleaved: bool


_ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": Architecture("llama", interleaved=True),
}


def architecture(family: str) -> Architecture:
    """The row of the table for a family. Raises NotExpressible if there is none."""
    if family not in _ARCHITECTURES:
        raise NotExpressible(
            "gguf",
            f"the family {family!r} is not written by this version (known: {', '.join(_ARCHITECTURES)})",
            instead="merge with --to hf and convert the result with llama.cpp's own converter",
        )
    return _ARCHITECTURES[family]


def tensor_name(slot: Slot) -> str:
    """llama.cpp's name of the tensor in ``slot``."""
    if slot.layer is None:
        return f"{_OUTSIDE[slot.role]}.{slot.part}"
    return f"blk.{slot.layer}.{_LAYER[slot.role]}.{slot.part}"
