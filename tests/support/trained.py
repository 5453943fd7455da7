"""Which tokens the session's adapters train."""

from __future__ import annotations

#: Existing ids whose rows the stock adapters train: a special token, two learned ones, not in ascending order.
TRAINED_IDS = (300, 17, 2)
#: Targets of adapters that train both matrices of an untied base.
HEAD_AND_EMBEDDING = ("embed_tokens", "lm_head")
NEW_TOKENS = ("<lamp>", "<ship>", "<fog>")
#: SmolLM2: <|im_end|>, a digit, a common and a rare word piece.
SMOLLM2_IDS = (2, 33, 1042, 40001)
#: Rows that the adapters of encoder-decoders train.
T5_IDS = (300, 17, 5)
