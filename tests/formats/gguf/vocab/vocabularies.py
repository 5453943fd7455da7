"""Folders with SentencePiece tokenizers in the form of published models, the same bytes on every machine.

Golden digests depend on them: after any change here they must be regenerated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fixtures.models.tokenizers import model_proto
from tests.formats.gguf.models import config

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
BYTES: Final = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
WORDS: Final = ("\u2581t", "he", "in", "\u2581the", "er", "ing", "\u2581a", "\u2581\u2581", *"\u2581acdehinrt01\u706f")


def model_file(head: Sequence[tuple[str, int]], normal: Sequence[str] = WORDS, *, algorithm: int = 2) -> bytes:
    """A tokenizer.model: ``head`` are pieces with their types, normal pieces follow with falling scores.

    algorithm: 2 for BPE, 1 for unigram.
    """
    proto = model_proto()
    for text, piece_type in head:
        proto.pieces.add(piece=text, score=0.0, type=piece_type)
    for rank, text in enumerate(normal):
        proto.pieces.add(piece=text, score=-float(rank))
    proto.trainer_spec.model_type = algorithm
    proto.trainer_spec.byte_fallback = algorithm == 2
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


LLAMA: Final = (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *BYTES)
#: Gemma's order, with the end of a turn at the id that is hard-coded in llama.cpp's converter.
GEMMA: Final = (
    *(("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN), ("<mask>", USER_DEFINED)),
    *((f"<unused{index}>", USER_DEFINED) for index in range(101)),
    *(("<start_of_turn>", USER_DEFINED), ("<end_of_turn>", USER_DEFINED), ("\n\n", USER_DEFINED)),
    *BYTES,
)


def stated(tokens: Mapping[int, str], special: bool) -> dict[str, Any]:
    """Entries of added_tokens_decoder."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": special}
    return {str(token_id): {"content": text, **flags} for token_id, text in tokens.items()}


def template(begin: str | None, end: str | None = None) -> dict[str, Any]:
    """A post-processor that adds tokens around a text."""
    text: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    first = [{"SpecialToken": {"id": begin, "type_id": 0}}] if begin else []
    last = [{"SpecialToken": {"id": end, "type_id": 0}}] if end else []
    return {"type": "TemplateProcessing", "single": first + text + last, "pair": [], "special_tokens": {}}


def tokenizer_json(added: Mapping[str, Any], **parts: Any) -> dict[str, Any]:
    """The parts of a tokenizer.json that are read beside a tokenizer.model with the pieces."""
    entries = [{"id": int(token_id), **entry} for token_id, entry in added.items()]
    model = {"type": "BPE", "byte_fallback": True, "vocab": {}, "merges": []}
    return {"added_tokens": entries, "normalizer": None, "pre_tokenizer": None, "model": model, **parts}


PREPEND: Final = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
}
REPLACE: Final = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
NAMES: Final = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
TEMPLATES: Final = [
    {"name": "default", "template": "{{ messages[0]['content'] }}"},
    {"name": "tool-use", "template": "{{ tools }}"},
    {"name": "rag", "template": "{{ documents }}"},
]


def folder(path: Path, model: bytes, configuration: Mapping[str, Any], **files: Mapping[str, Any]) -> Path:
    """Write config.json, tokenizer.model and ``files`` (name without .json → content)."""
    path.mkdir()
    (path / "tokenizer.model").write_bytes(model)
    for name, content in {"config": configuration, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def llama2(path: Path) -> Path:
    """As transformers 4 saves it: all added tokens are stated in tokenizer_config.json."""
    tokens = stated({0: "<unk>", 1: "<s>", 2: "</s>"}, special=True)
    settings = {**NAMES, "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": tokens, "legacy": True}
    return folder(
        path,
        model_file(LLAMA),
        config(vocab_size=288),
        tokenizer_config=settings,
        tokenizer=tokenizer_json(tokens, normalizer=PREPEND, post_processor=template("<s>")),
    )


def llama2_alone(path: Path) -> Path:
    """tokenizer.model and nothing else."""
    return folder(path, model_file(LLAMA), config(vocab_size=280))


def llama2_added(path: Path) -> Path:
    """With added tokens, special and others, with an added_tokens.json that agrees, and several templates."""
    tokens = stated({0: "<unk>", 1: "<s>", 2: "</s>", 280: "<|tool|>"}, special=True)
    tokens |= stated({281: "<lamp>", 282: "fog\u2581bank"}, special=False)
    settings = {**NAMES, "added_tokens_decoder": tokens, "add_bos_token": True, "add_prefix_space": True}
    return folder(
        path,
        model_file(LLAMA),
        config(vocab_size=288),
        tokenizer_config={**settings, "chat_template": TEMPLATES, "pad_token": "<unk>"},
        added_tokens={"<lamp>": 281},
        tokenizer=tokenizer_json(tokens, normalizer=PREPEND, post_processor=template("<s>", "</s>")),
    )


def mistral(path: Path) -> Path:
    """As transformers 5 saves it: tokenizer.json, not tokenizer_config.json, has the added tokens."""
    tokens = stated({0: "<unk>", 1: "<s>", 2: "</s>"}, special=True)
    first = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    return folder(
        path,
        model_file(LLAMA),
        config(vocab_size=280, model_type="mistral", architectures=["MistralForCausalLM"]),
        tokenizer_config={**NAMES, "add_prefix_space": None},
        tokenizer=tokenizer_json(tokens, pre_tokenizer=first, post_processor=template("<s>")),
    )


def phi3(path: Path) -> Path:
    """An embedding larger than the vocabulary, and ends of turns as added tokens."""
    tokens = stated({0: "<unk>", 1: "<s>", 280: "<|endoftext|>", 281: "<|assistant|>", 282: "<|end|>"}, special=True)
    tokens |= stated({2: "</s>"}, special=False)
    return folder(
        path,
        model_file(LLAMA),
        config(vocab_size=320, model_type="phi3", architectures=["Phi3ForCausalLM"], eos_token_id=280),
        tokenizer_config={
            **NAMES,
            "added_tokens_decoder": tokens,
            "eos_token": "<|endoftext|>",
            "add_bos_token": False,
        },
        tokenizer=tokenizer_json(tokens, normalizer=PREPEND, post_processor=template(None)),
    )


def gemma(path: Path, model_type: str = "gemma", architecture: str = "GemmaForCausalLM") -> Path:
    """No space before a text; tokens that look special but are not flagged."""
    tokens = stated(
        {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 106: "<start_of_turn>", 107: "<end_of_turn>"}, True
    )
    tokens |= stated({4: "<mask>", 5: "<unused0>", 108: "\n\n"} | {i + 5: f"<unused{i}>" for i in range(101)}, False)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    head_dim: dict[str, Any] = {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": None,
        "sliding_window": 64,
    }
    head_dim |= {"final_logit_softcapping": None} if model_type == "gemma3_text" else {}
    if model_type == "gemma2":
        head_dim |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    ids = {"bos_token_id": 2, "eos_token_id": [1, 107], "pad_token_id": 0}
    return folder(
        path,
        model_file(GEMMA),
        config(vocab_size=400, model_type=model_type, architectures=[architecture], **head_dim, **ids),
        tokenizer_config={**names, "added_tokens_decoder": tokens, "add_bos_token": True, "add_eos_token": False},
        tokenizer=tokenizer_json(tokens, normalizer=REPLACE, post_processor=template("<bos>")),
    )


def gemma2(path: Path) -> Path:
    """The same tokenizer under the second generation's architecture."""
    return gemma(path, "gemma2", "Gemma2ForCausalLM")


def gemma3(path: Path) -> Path:
    """The same tokenizer under the third generation's architecture."""
    return gemma(path, "gemma3_text", "Gemma3ForCausalLM")


def t5(path: Path) -> Path:
    """A unigram model, with sentinels in an older added_tokens.json."""
    head = (("<pad>", CONTROL), ("</s>", CONTROL), ("<unk>", UNKNOWN))
    sizes = {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_heads": 4, "num_layers": 2, "n_positions": 256}
    sizes |= {"num_decoder_layers": 2, "relative_attention_num_buckets": 32, "decoder_start_token_id": 0}
    ids = {"eos_token_id": 1, "pad_token_id": 0, "layer_norm_epsilon": 1e-6, "vocab_size": 40}
    names = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    model = model_file(head, algorithm=1)
    return folder(path, model, names | sizes | ids, added_tokens={"<extra_id_1>": 30, "<extra_id_0>": 31})


VOCABULARIES: Final[Mapping[str, Callable[[Path], Path]]] = {
    "llama2": llama2,
    "llama2-alone": llama2_alone,
    "llama2-added": llama2_added,
    "mistral": mistral,
    "phi3": phi3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "t5": t5,
}
