"""Config values that are needed to construct models whose default config is not sufficient.

The facts in exporter/models/data do not depend on the config values that this module chooses.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, Final

_ROPE: Final = {"rope_type": "default", "rope_theta": 10000.0}
#: Config key → value that replaces None under this key in every config.
_WHERE_NONE: Final[dict[str, Any]] = {
    "head_dim": 64,
    "num_key_value_heads": 8,
    "vocab_size": 1000,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "downsample_rate": "1/2",
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
    "vocabulary_map": {},
    "indexer_n_heads": 8,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 64,
    "indexer_budget": 64,
    "indexer_compress_ratio": 8,
    "deepstack_layer_map": [[0, 0]],
}
#: Name of a config class → values of keys in configs of the class.
_BY_CONFIG: Final[dict[str, dict[str, Any]]] = {
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "DbrxAttentionConfig": {"rope_theta": 10000.0},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense"] + ["sparse"] * 100},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 100},
    "MoonshineStreamingConfig": {"num_key_value_heads": 8},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 64},
    "T5Gemma2TextConfig": {"dropout_rate": 0.0},
}
#: Name of a model class → values of keys in the config of the class.
_BY_CLASS: Final[dict[str, dict[str, Any]]] = {
    "AyaVisionForConditionalGeneration": {"vision_config.num_attention_heads": 16},
    "AyaVisionModel": {"vision_config.num_attention_heads": 16},
    "PerceptionLMForConditionalGeneration": {"vision_config.model_args": {"embed_dim": 1024}},
    "PerceptionLMModel": {"vision_config.model_args": {"embed_dim": 1024}},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
}


def configs(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, config) for ``config`` and every config nested in ``config``."""
    from transformers import PreTrainedConfig

    yield path, config
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from configs(value, f"{path}.{key}".lstrip("."))


def constructible(cls: Any) -> Any:
    """Return a config from which a model of class ``cls`` can be constructed."""
    config = cls.config_class()
    for _, table in configs(config):
        for key, value in _WHERE_NONE.items():
            if key in vars(table) and vars(table)[key] is None:
                setattr(table, key, value)
        for key, value in _BY_CONFIG.get(type(table).__name__, {}).items():
            setattr(table, key, value)
    for path, value in _BY_CLASS.get(cls.__name__, {}).items():
        *nested, key = path.split(".")
        table = config
        for name in nested:
            table = getattr(table, name)
        setattr(table, key, value)
    return config


@contextmanager
def without_timm() -> Iterator[None]:
    """Replace vision towers of the package timm by empty modules, because only facts about text models are needed."""
    import torch
    from transformers import PreTrainedModel
    from transformers.models.timm_wrapper import modeling_timm_wrapper as timm

    classes: tuple[Any, ...] = (timm.TimmWrapperModel, timm.TimmWrapperForImageClassification)
    originals = [cls.__init__ for cls in classes]

    def empty(self: Any, config: Any) -> None:
        PreTrainedModel.__init__(self, config)
        self.timm_model = torch.nn.Identity()
        self.post_init()

    for cls in classes:
        cls.__init__ = empty
    try:
        yield
    finally:
        for cls, original in zip(classes, originals, strict=True):
            cls.__init__ = original


@contextmanager
def quiet() -> Iterator[None]:
    """Discard the lines that transformers prints about its own docstrings, and the warnings of libraries.

    Exceptions are not suppressed, so that no generated fact can be wrong because of a discarded error.
    """
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
