"""Map the roles of a decoder's tensors, such as the query projection, to llama.cpp's tensor names.

Sources: the gguf-py package for the tensor names, and GGUF's specification (docs/gguf.md) for the metadata keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from exporter.families.llama_cpp import Architecture
from exporter.families.spec import Role, Slot

_OUTSIDE: Final[Mapping[Role, str]] = {
    Role.EMBED: "token_embd",
    Role.POSITIONS: "position_embd",
    Role.FINAL_NORM: "output_norm",
    Role.HEAD: "output",
}
_LAYER: Final[Mapping[Role, str]] = {
    Role.ATTN_NORM: "attn_norm",
    Role.Q: "attn_q",
    Role.K: "attn_k",
    Role.V: "attn_v",
    Role.QKV: "attn_qkv",
    Role.Q_NORM: "attn_q_norm",
    Role.K_NORM: "attn_k_norm",
    Role.ATTN_OUT: "attn_output",
    Role.ATTN_POST_NORM: "post_attention_norm",
    Role.MLP_NORM: "ffn_norm",
    Role.GATE: "ffn_gate",
    Role.UP: "ffn_up",
    Role.GATE_UP: "ffn_up",  # llama.cpp reads the first half of a joint matrix as the gate
    Role.DOWN: "ffn_down",
    Role.MLP_POST_NORM: "post_ffw_norm",
    Role.ROUTER: "ffn_gate_inp",
    Role.EXPERT_GATE: "ffn_gate_exps",
    Role.EXPERT_UP: "ffn_up_exps",
    Role.EXPERT_DOWN: "ffn_down_exps",
}


def tensor_name(slot: Slot, row: Architecture) -> str:
    """Return the name of the tensor of ``slot``, which gives role and layer, in llama.cpp's architecture ``row``.

    llama.cpp stores the matrices of all experts as one stacked tensor, so the name returned for an expert's matrix is
    the name of the stacked tensor.
    """
    if slot.layer is None:
        return f"{_OUTSIDE[slot.role]}.{slot.parameter}"
    return f"blk.{slot.layer}.{row.renamed.get(slot.role, _LAYER[slot.role])}.{slot.parameter}"
