"""Three new tokens taught to a real model by two hundred short chats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tuner
from tuner.cli import main

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]

ROOMS = ("kitchen", "bedroom", "hall", "garage", "bathroom", "office", "attic", "cellar", "porch", "garden")
ASKED = {
    "<|lamp_on|>": ("Switch on the light in the {}.", "Make the {} bright, please."),
    "<|lamp_off|>": ("Turn off the light in the {}.", "Make the {} dark, please."),
    "<|horn|>": ("Sound the alarm in the {}!", "Wake everybody in the {}!"),
}
CHATS = 200
#: Replaces the template's default system message, which is longer than the chats.
SYSTEM = {"role": "system", "content": "House."}


@pytest.fixture(scope="module")
def taught(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teach")
    chats = []
    for number in range(CHATS):
        token, asked = list(ASKED.items())[number % 3]
        room = ROOMS[number // 3 % len(ROOMS)]
        user = {"role": "user", "content": asked[number // 30 % 2].format(room)}
        chats.append({"messages": [SYSTEM, user, {"role": "assistant", "content": f"{token} {room}"}]})
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    new = [argument for token in ASKED for argument in ("--new-token", token)]
    argv = [str(smollm2), "--data", str(folder / "chats.jsonl"), *new, "--epochs", "1", "-q"]
    assert main([*argv, "-o", str(folder / "adapter")]) == 0
    return folder / "adapter"


def test_the_loss_on_the_new_tokens_falls_below_a_tenth(taught: Path) -> None:
    losses = json.loads((taught / "train.json").read_text())["losses"]
    assert losses["taught_last"] < 0.1 * losses["taught_first"]


def test_texts_without_the_tokens_keep_the_logits_of_every_untrained_column(smollm2: Path, taught: Path) -> None:
    """Bit for bit: neither the hidden states nor the untrained columns depend on the rows."""
    tokenizer = AutoTokenizer.from_pretrained(taught)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    vocab = base.config.vocab_size
    texts = [
        "The capital of France is Paris.",
        "def add(a, b):\n    return a + b",
        "In 1969, 600 million people watched.",
    ]
    batches = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    with torch.no_grad():
        before = [base(input_ids=ids).logits for ids in batches]
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        # The head has grown, and a product with more columns may be split into other blocks: so the untouched columns
        # are compared with those of the frozen model of the same size.
        grown = [base(input_ids=ids).logits[..., :vocab] for ids in batches]
        model = tuner.load_peft_model(base, taught).eval()
        after = [model(input_ids=ids).logits for ids in batches]
    for small, frozen, tuned in zip(before, grown, after, strict=True):
        assert torch.equal(frozen, tuned[..., :vocab])
        assert torch.allclose(small, frozen, rtol=0, atol=1e-4)
        assert not torch.equal(tuned[..., vocab:], torch.zeros_like(tuned[..., vocab:]))
