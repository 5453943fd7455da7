"""Render report.html, a self-contained page with the content of report.json."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from exporter.verify.reports.plots import kl_by_position, logit_scatter, row_bars
from exporter.verify.tolerances import ROW_ERROR_SHARE

_TEMPLATE: Final = "report.html.jinja"
#: Number of powers of ten over which the colour of a token fades, counted from the largest KL.
_DECADES: Final = 2


def to_html(document: Mapping[str, Any]) -> bytes:
    """Return the content of report.html for ``document``, which is the content of report.json.

    The HTML page works without network access and without JavaScript.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["figure"] = _figure
    source = resources.files(__package__).joinpath(_TEMPLATE).read_text("utf-8")
    artifacts = [
        {
            **artifact,
            "plots": list(_plots(artifact, f"a{number}")),
            "heat": _heat(artifact),
            "shown": _profiled_model(artifact),
        }
        for number, artifact in enumerate(document["artifacts"], 1)
    ]
    page = environment.from_string(source).render({**document, "artifacts": artifacts})
    return (page.rstrip() + "\n").encode()


def _profiled_model(artifact: Mapping[str, Any]) -> str | None:
    """Return the name of the model in the plots, or None if the artifact contains only one model.

    If an artifact contains several models, only the first model that was run is plotted.
    """
    runs = [name for name in artifact["facts"] if name.endswith(": runtime")]
    return runs[0].removesuffix(": runtime") if artifact["profile"] and len(runs) > 1 else None


def _plots(artifact: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Yield each plot whose data the report contains.

    The plots of logits require that the model was run, and the bar plot requires trained rows.
    """
    profile = artifact["profile"]
    if profile is not None:
        svg = kl_by_position(profile["traces"], f"{name}-kl")
        yield {"kind": "kl", "title": "KL divergence by position and kind of position", "svg": Markup(svg)}
        svg = logit_scatter(profile["logits"], f"{name}-logits")
        yield {"kind": "logits", "title": "Logits of the artifact against logits of the reference", "svg": Markup(svg)}
    if artifact["rows"]:
        svg = row_bars(artifact["rows"], ROW_ERROR_SHARE, f"{name}-rows")
        yield {"kind": "rows", "title": "Errors of the trained rows, in descending order", "svg": Markup(svg)}


def _heat(artifact: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return each token with its KL divergence and a colour intensity from 0 to 1, or None if no model was run.

    The colour intensity of a token rises linearly with the logarithm of the KL divergence at the token's position.
    """
    if artifact["profile"] is None:
        return None
    traces = artifact["profile"]["traces"]
    hottest = max((kl for trace in traces for kl in trace["kl"] if kl is not None), default=0.0)

    def heat(kl: float | None) -> float:
        if kl is None:
            return 1.0
        if kl <= 0 or hottest <= 0:
            return 0.0
        return round(max(0.0, 1.0 + math.log10(kl / hottest) / _DECADES), 2)

    lines = [
        [
            {"word": word, "kind": position_kind, "kl": kl, "heat": heat(kl)}
            for word, position_kind, kl in zip(trace["words"], trace["kinds"], trace["kl"], strict=True)
        ]
        for trace in traces
    ]
    return {"lines": lines, "hottest": hottest, "coldest": hottest / 10**_DECADES}


def _figure(value: object) -> str:
    """Format a float with three significant digits, or return "" for None."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
