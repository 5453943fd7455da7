"""The plots of a report as SVG that stands inside the page and takes its colours from the page's CSS variables."""

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

#: matplotlib wants colours, the page has variables: each is drawn in a colour that occurs nowhere else.
_INKS: Final = {f"#0102{number:02x}": name for number, name in enumerate(("ink", "muted", "grid", "limit", "point"), 1)}
_SERIES: Final = {kind: f"#0103{number:02x}" for number, kind in enumerate(KINDS, 1)}
_VARIABLES: Final = _INKS | {colour: f"series-{number}" for number, colour in enumerate(_SERIES.values(), 1)}
_INK, _MUTED, _GRID, _LIMIT, _POINT = _INKS
_STYLE: Final = {
    "svg.fonttype": "none",  # text stays text: searchable, small, in the page's font
    "svg.hashsalt": "ttexport",  # names inside the file do not change from run to run
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
#: A KL below this is float64's rounding; a logarithmic axis needs a lowest value.
_FLOOR: Final = 1e-12
_MOST_BARS: Final = 32
#: A row that is stored exactly still gets the stump of a bar.
_STUMP: Final = 1e-4
_POWERS: Final = FuncFormatter(lambda value, _: f"{value:.0e}")


def kl_by_position(traces: Sequence[Mapping[str, Any]], name: str) -> str:
    """For each kind of position: the mean over sequences at every position, and the farthest one as a thin line."""
    found: dict[str, dict[int, list[float]]] = {kind: {} for kind in KINDS}
    for trace in traces:
        for position, (kind, kl) in enumerate(zip(trace["kinds"], trace["kl"], strict=True)):
            if kl is not None:
                found[kind].setdefault(position, []).append(max(kl, _FLOOR))

    def draw(axes: Axes) -> None:
        for kind, by_position in found.items():
            if by_position:
                places = sorted(by_position)
                means = [np.mean(by_position[place]) for place in places]
                most = [max(by_position[place]) for place in places]
                axes.vlines(places, means, most, color=_SERIES[kind], linewidth=0.8)
                axes.plot(places, means, "o", markersize=3.5, color=_SERIES[kind], label=kind)
        known = [kl for by_position in found.values() for kls in by_position.values() for kl in kls] or [_FLOOR]
        axes.set(yscale="log", xlabel="position in the sequence", ylabel="KL (nats): mean, up to the largest")
        axes.set_ylim(*_decades(min(known), max(known)))
        axes.yaxis.set_major_formatter(_POWERS)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), handletextpad=0.2, columnspacing=1.2)

    return _svg(draw, name, height=3.2)


def logit_scatter(pairs: Mapping[str, Sequence[float | None]], name: str) -> str:
    """Each dot is one logit; on the diagonal the artifact says what the reference says."""
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
    """A bar a trained row, the worst first: how far the stored row is off, as a share of what training changed."""
    bars = [
        (error / change if change else 0.0, f"{one['use']} {token_id}")
        for one in rows
        for token_id, error, change in zip(one["token_ids"], one["errors"], one["changes"], strict=True)
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
        axes.set_xlabel(f"‖stored - trained‖ / ‖trained - base‖, the limit at {limit:g}")
        axes.grid(visible=False, axis="y")

    return _svg(draw, name, height=1.2 + 0.18 * len(shown))


def _decades(low: float, high: float) -> tuple[float, float]:
    """The powers of ten around a range, at least one apart, so that an axis has two labels."""
    bottom = math.floor(math.log10(low))
    return 10.0**bottom, 10.0 ** max(bottom + 1, math.ceil(math.log10(high)))


def _svg(draw: Callable[[Axes], None], name: str, *, height: float) -> str:
    """``draw`` on a figure of 6 by ``height`` inches. ``name`` keeps the ids of several figures on a page apart."""
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
