"""Draw the plots of a report as inline SVG, with colours from the CSS variables of the HTML page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from exporter.verify.running.prompts import KINDS

#: Colours that stand for CSS variables. matplotlib needs colours, so each variable is drawn in a unique colour that is
#: replaced in the SVG.
_INKS: Final = {f"#0102{number:02x}": name for number, name in enumerate(("ink", "muted", "grid", "limit", "point"), 1)}
_SERIES: Final = {position_kind: f"#0103{number:02x}" for number, position_kind in enumerate(KINDS, 1)}
_VARIABLES: Final = _INKS | {colour: f"series-{number}" for number, colour in enumerate(_SERIES.values(), 1)}
_INK, _MUTED, _GRID, _LIMIT, _POINT = _INKS
_STYLE: Final = {
    "svg.fonttype": "none",  # text stays searchable and small, in the page's font
    "svg.hashsalt": "ttexport",  # keeps ids equal in every run
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
}
#: Lower bound of the logarithmic KL axis. A smaller KL is rounding noise of float64.
_FLOOR: Final = 1e-12
_MOST_BARS: Final = 32
#: Length of the bar for a row that is stored exactly.
_STUMP: Final = 1e-4
_POWERS: Final = FuncFormatter(lambda value, _: f"{value:.0e}")


def kl_by_position(traces: Sequence[Mapping[str, Any]], name: str) -> str:
    """Plot the mean KL over all sequences at each position, with a thin line from the mean up to the largest KL.

    Each kind of position (for example a trained token as input) is plotted in a separate colour.
    """
    by_kind: dict[str, dict[int, list[float]]] = {position_kind: {} for position_kind in KINDS}
    for trace in traces:
        for position, (position_kind, kl) in enumerate(zip(trace["kinds"], trace["kl"], strict=True)):
            if kl is not None:
                by_kind[position_kind].setdefault(position, []).append(max(kl, _FLOOR))

    def draw(axes: Axes) -> None:
        for position_kind, by_position in by_kind.items():
            if by_position:
                positions = sorted(by_position)
                means = [np.mean(by_position[position]) for position in positions]
                largest = [max(by_position[position]) for position in positions]
                axes.vlines(positions, means, largest, color=_SERIES[position_kind], linewidth=0.8)
                axes.plot(positions, means, "o", markersize=3.5, color=_SERIES[position_kind], label=position_kind)
        values = [kl for by_position in by_kind.values() for kls in by_position.values() for kl in kls] or [_FLOOR]
        axes.set(yscale="log", xlabel="position in the sequence", ylabel="mean and largest KL (nats)")
        axes.set_ylim(*_decades(min(values), max(values)))
        axes.yaxis.set_major_formatter(_POWERS)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), handletextpad=0.2, columnspacing=1.2)

    return _svg(draw, name, height=3.2)


def logit_scatter(pairs: Mapping[str, Sequence[float | None]], name: str) -> str:
    """Plot one dot per sampled logit, to compare the logit in the artifact with the logit in the reference.

    A dot lies on the diagonal if the artifact and the reference have equal logits.
    """
    both = [pair for pair in zip(pairs["reference"], pairs["artifact"], strict=True) if None not in pair]
    points = np.array(both, np.float64).reshape(-1, 2)

    def draw(axes: Axes) -> None:
        if len(points):
            ends = [points.min(), points.max()]
            axes.plot(ends, ends, color=_MUTED, linewidth=1)
        axes.plot(points[:, 0], points[:, 1], "o", markersize=3, color=_POINT, markeredgewidth=0)
        axes.set(xlabel="logit of the reference", ylabel="logit of the artifact")

    return _svg(draw, name, height=3.2)


def row_bars(rows: Sequence[Mapping[str, Any]], limit: float, name: str) -> str:
    """Plot one bar for each trained row, in order of decreasing length.

    The length of a bar is the storage error of the row divided by the change of the row during training.
    """
    bars = [
        (error / change if change else 0.0, f"{matrix['use']} {token_id}")
        for matrix in rows
        for token_id, error, change in zip(matrix["token_ids"], matrix["errors"], matrix["changes"], strict=True)
        if error is not None and change is not None
    ]
    shown = sorted(bars, key=lambda bar: (-bar[0], bar[1]))[:_MOST_BARS]

    def draw(axes: Axes) -> None:
        lengths = [max(share, _STUMP) for share, _ in shown]
        axes.barh(range(len(shown)), lengths, height=0.7, color=_POINT)
        axes.set_yticks(range(len(shown)), [label for _, label in shown])
        axes.axvline(limit, color=_LIMIT, linewidth=1.2)
        axes.set(xscale="log", xlim=(_STUMP / 2, max([limit * 2, *lengths])), ylim=(len(shown), -1))
        axes.xaxis.set_major_formatter(_POWERS)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"‖stored - trained‖ / ‖trained - base‖ (limit: {limit:g})")
        axes.grid(visible=False, axis="y")

    return _svg(draw, name, height=1.2 + 0.18 * len(shown))


def _decades(low: float, high: float) -> tuple[float, float]:
    """Return the largest power of ten that is at most ``low``, and the smallest power of ten that is at least ``high``.

    The two returned powers of ten differ even if ``low`` equals ``high``, so that the plot axis has two labels.
    """
    bottom = math.floor(math.log10(low))
    return 10.0**bottom, 10.0 ** max(bottom + 1, math.ceil(math.log10(high)))


def _svg(draw: Callable[[Axes], None], name: str, *, height: float) -> str:
    """Draw an SVG figure with a width of 6 inches and a height of ``height`` inches.

    name: prefix for the ids in the SVG, so that the ids of different figures on the same page do not collide.
    """
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(6, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.strip()
