"""Create the reports of a training run: metrics.jsonl, the loss curve, and the losses for the training record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from exporter.errors import writing

__all__ = ["losses", "write_curve", "write_metrics"]

# Name in transformers → name in ttexport. Times and memory usage are left out, because they differ between runs.
_NAMES: Final[Mapping[str, str]] = {
    "step": "step",
    "epoch": "epoch",
    "loss": "loss",
    "taught_loss": "taught_loss",
    "eval_loss": "eval_loss",
    "eval_taught_loss": "eval_taught_loss",
    "learning_rate": "lr",
    "grad_norm": "grad_norm",
}
_CURVES: Final = {
    "loss": ("all tokens", "tab:blue", "-"),
    "taught_loss": ("taught tokens", "tab:orange", "-"),
    "eval_loss": ("all tokens, held out", "tab:blue", "o--"),
    "eval_taught_loss": ("taught tokens, held out", "tab:orange", "o--"),
}


def metrics(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of training steps and evaluations in a trainer's log history.

    Keys of transformers are renamed to those of ttexport, such as ``learning_rate`` to ``lr``.
    """
    entries = [{ours: entry[name] for name, ours in _NAMES.items() if name in entry} for entry in history]
    return [entry for entry in entries if "loss" in entry or "eval_loss" in entry]


def losses(history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the first and last value of every loss in a log history, with keys such as ``first`` and ``eval_last``."""
    ends: dict[str, float] = {}
    for entry in metrics(history):
        for name in _CURVES.keys() & entry.keys():
            prefix = name.removesuffix("loss")
            ends.setdefault(f"{prefix}first", entry[name])
            ends[f"{prefix}last"] = entry[name]
    return dict(sorted(ends.items()))


def write_metrics(folder: Path, history: Iterable[Mapping[str, Any]]) -> None:
    """Write metrics.jsonl, with one line per training step or evaluation."""
    with writing(folder):
        lines = "".join(json.dumps(entry) + "\n" for entry in metrics(history))
        (folder / "metrics.jsonl").write_text(lines, "utf-8")


def write_curve(folder: Path, history: Iterable[Mapping[str, Any]]) -> None:
    """Draw loss.png, which shows the losses over the steps.

    The loss axis is logarithmic, because losses span orders of magnitude.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = metrics(history)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, (label, colour, style) in _CURVES.items():
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=1.2, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    with writing(folder):
        # matplotlib's name and version are left out of the file, so the same run gives the same bytes.
        FigureCanvasAgg(figure).print_png(folder / "loss.png", metadata={"Software": None})  # type: ignore[no-untyped-call]
