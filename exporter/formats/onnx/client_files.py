"""Make the config and tokenizer files that transformers.js and onnxruntime-genai read.

Sources: documentation of the ``transformers.js_config`` table and of onnxruntime-genai's genai_config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.families.spec import DecoderSpec
from exporter.formats.onnx.weights.precision import PRECISIONS, Precision
from exporter.io.files import read_file
from exporter.io.json_objects import as_json, read_object
from exporter.merge.model import MergedModel
from exporter.merge.vocabulary.templates import read_template, template_files, template_setting
from exporter.sources.hf.checkpoint import GENERATION_CONFIG, TOKENIZER_CONFIG


def client_files(
    model: MergedModel,
    spec: DecoderSpec | None,
    precisions: Sequence[Precision] = (PRECISIONS["fp32"],),
    *,
    shared_cache: bool = False,
) -> dict[str, bytes]:
    """Return the config and tokenizer files that the ONNX clients read, as a dict that maps file names to contents.

    spec: the decoder's dimensions, which genai_config.json contains, or None to omit genai_config.json. shared_cache:
    whether the graph accepts a preallocated KV cache with room for more tokens than are cached. Raises UnreadableFile
    if a config or tokenizer file of the checkpoint cannot be read.
    """
    files = auxiliary_contents(model.files, model.templates, model.rewritten)
    files["config.json"] = as_json(_config(model.config, precisions))
    if model.generation_config:
        files.setdefault(GENERATION_CONFIG, as_json(model.generation_config))
    if spec is not None:
        ids = {**model.config, **model.generation_config}
        files["genai_config.json"] = as_json(_genai(spec, precisions[0].stems[0], ids, shared_cache=shared_cache))
    return files


def auxiliary_contents(
    files: Mapping[str, Path], templates: Mapping[str, str], rewritten: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Read the auxiliary files (a dict of name → path), and adapt the file contents to the ONNX clients.

    templates: dict from name to text of each chat template. rewritten: contents that replace files, by file name.
    Raises UnreadableFile, and NotExpressible if the name of a chat template cannot be a file name.
    """
    contents = {name: read_file(path) for name, path in files.items()} | dict(rewritten)
    if not templates:
        return contents
    # onnxruntime-genai reads the template from the .jinja file, and transformers.js from tokenizer_config.json.
    for name, content in template_files(templates).items():
        if name not in files or read_template(files[name]).encode() != content:
            contents[name] = content
    if path := files.get(TOKENIZER_CONFIG):
        config = read_object(path)
        stated = template_setting(templates)
        if config.get("chat_template") != stated:
            contents[TOKENIZER_CONFIG] = as_json({**config, "chat_template": stated})
    return contents


def _config(config: Mapping[str, Any], precisions: Sequence[Precision]) -> dict[str, Any]:
    """Add to the config the table ``transformers.js_config``, which lists external data files and KV cache dtypes."""
    given = config.get("transformers.js_config")
    table = dict(given) if isinstance(given, dict) else {}
    stems = [stem for precision in precisions for stem in precision.stems]
    table["use_external_data_format"] = {f"{stem}.onnx": 1 for stem in stems}
    # transformers.js 3 reads the cache's dtype from this key; transformers.js 4 reads the cache's dtype from the graph.
    if halves := {precision.js_dtype: "float16" for precision in precisions if precision.floats == "F16"}:
        table["kv_cache_dtype"] = halves
    return {**config, "transformers.js_config": table}


def genai_ids(ids: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special token ids for genai_config.json.

    ids: a dict that contains all keys of config.json and generation_config.json.
    """
    eos = ids.get("eos_token_id")
    first_eos = eos[0] if isinstance(eos, list) and eos else eos
    tokens = {
        "bos_token_id": ids.get("bos_token_id"),
        "eos_token_id": eos,
        # A batch needs a padding token. Any token will do, because the attention mask hides the padding.
        "pad_token_id": first_eos if ids.get("pad_token_id") is None else ids["pad_token_id"],
    }
    return {name: value for name, value in tokens.items() if value is not None}


def _genai(spec: DecoderSpec, stem: str, ids: Mapping[str, Any], *, shared_cache: bool) -> dict[str, Any]:
    """Return the content of genai_config.json.

    stem: the file name of the ONNX model, without the extension. ids: a dict that contains all keys of config.json and
    generation_config.json.
    """
    attention = spec.attention
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": f"onnx/{stem}.onnx",
        "head_size": attention.head_dim,
        "hidden_size": spec.hidden,
        "num_attention_heads": attention.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": attention.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    return {
        "model": {
            "type": spec.family,
            "vocab_size": spec.vocab,
            "context_length": spec.max_positions,
            **genai_ids(ids),
            "decoder": decoder,
        },
        # The Attention operator appends to the cache input, so a shared, preallocated buffer would have the wrong
        # length.
        "search": {"do_sample": False, "max_length": spec.max_positions, "past_present_share_buffer": shared_cache},
    }
