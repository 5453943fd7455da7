from __future__ import annotations

from pathlib import Path

import pytest

from exporter.errors import LedgerError
from exporter.merge import changes
from exporter.merge.ledger import Ledger
from exporter.merge.plan import plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter


def ledger() -> Ledger:
    return Ledger(Path("a.safetensors"), ["one", "two"], what="rule")


def test_a_closed_ledger_names_every_rule() -> None:
    account = ledger()
    account.take("two", "second")
    account.take("one", "first")
    assert account.close() == {"one": "first", "two": "second"}


def test_a_tensor_without_a_rule_is_named() -> None:
    account = ledger()
    account.take("one", "first")
    with pytest.raises(
        LedgerError, match=r"^a\.safetensors: two: expected one rule, found no rule, so the tensor would be lost$"
    ):
        account.close()


def test_a_tensor_with_two_rules_is_named_with_both() -> None:
    account = ledger()
    account.take("one", "first")
    with pytest.raises(LedgerError, match="one: expected one rule, found two: first, again"):
        account.take("one", "again")


def test_an_unknown_tensor_cannot_be_taken() -> None:
    with pytest.raises(LedgerError, match=r"three: expected a known tensor, found an unknown tensor \(rule: first\)"):
        ledger().take("three", "first")


def mutate(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Break the pairing of adapter tensors with base tensors, as a bug in its rules might."""
    sound = changes._consumed

    def broken(checkpoint: Checkpoint, adapter: Adapter) -> object:
        entries = list(sound(checkpoint, adapter))
        return entries[1:] if change == "drop" else [*entries, entries[0]]

    monkeypatch.setattr(changes, "_consumed", broken)


@pytest.mark.parametrize(
    ("change", "message"), [("drop", "found no rule, so the tensor would be lost"), ("double", "found two: ")]
)
def test_a_rule_that_goes_missing_or_fires_twice_stops_the_merge(
    change: str, message: str, tiny_adapter: Path, tiny_tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, adapter = Checkpoint.open(tiny_tied), Adapter.open(tiny_adapter)
    assert len(plan_merge(checkpoint, [adapter]).ledger_entries) == 2
    mutate(monkeypatch, change)
    with pytest.raises(LedgerError, match=message) as caught:
        plan_merge(checkpoint, [adapter])
    assert caught.value.path == tiny_adapter / "adapter_model.safetensors"
    assert caught.value.tensor in {edit.key for edit in adapter.edits}


def test_a_writer_that_forgets_a_tensor_or_repeats_one_is_stopped(tiny_tied: Path) -> None:
    model = plan_merge(Checkpoint.open(tiny_tied), []).model()
    first, *others = model.specs
    account = model.ledger()
    for name in others:
        account.take(name, "written")
    with pytest.raises(LedgerError, match=f"{first}: expected one writer, found no writer"):
        account.close()
    with pytest.raises(LedgerError, match="expected one writer, found two"):
        account.take(others[0], "written again")
