"""report.html in a real browser: Debian's chromium, headless.

CI sets TTEXPORT_REQUIRE_BROWSER: without a browser, the tests then fail instead of being skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from exporter.tensors import Array
from tests.support.documents import read_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.browser
DARK = "--blink-settings=preferredColorScheme=0"


@pytest.fixture(scope="module")
def chromium() -> str:
    if CHROMIUM is None:
        if os.environ.get("TTEXPORT_REQUIRE_BROWSER"):
            pytest.fail("TTEXPORT_REQUIRE_BROWSER is set and there is no chromium")
        pytest.skip("no chromium (Debian: apt-get install chromium)")
    return CHROMIUM


def shoot(chromium: str, page: Path, *flags: str) -> tuple[Array, list[str]]:
    """(pixels (height, width, 3) from 0 to 255, lines of the console)."""
    picture = page.with_suffix(".png")
    command = [
        chromium,
        "--headless",
        "--no-sandbox",  # a container's root has no user namespaces
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={page.parent / 'profile'}",
        "--window-size=1280,12000",
        f"--screenshot={picture}",
        *flags,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return np.rint(imread(picture)[..., :3] * 255).astype(np.int16), console


def pixels(picture: Array, colour: str) -> int:
    """Number of pixels with this colour, #rrggbb."""
    want = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return int((np.abs(picture - want).max(axis=2) <= 3).sum())


def painted(page: str, kind: str, colour: str) -> str:
    """The page with every mark of one kind of plot in a unique colour."""
    rule = "; ".join(f"--{name}: {colour}" for name in ("point", *(f"series-{n}" for n in range(1, 6))))
    return page.replace("</style>", f"figure.{kind} {{ {rule}; }}\n</style>", 1)


@pytest.mark.parametrize("flags", [(), (DARK,)], ids=["light", "dark"])
@pytest.mark.slow
def test_the_page_opens_without_console_errors_and_every_plot_is_there(
    flags: tuple[str, ...], chromium: str, report: Path, tmp_path: Path
) -> None:
    page = (report / "report.html").read_text("utf-8")
    colours = {"kl": "#fe00fe", "logits": "#00fefe", "rows": "#fefe00"}
    for kind, colour in colours.items():
        page = painted(page, kind, colour)
    (tmp_path / "page.html").write_text(page, "utf-8")
    picture, console = shoot(chromium, tmp_path / "page.html", *flags)
    assert console == []
    corner = picture[2, 2].mean()
    assert corner < 60 if flags else corner > 220
    artifacts = len(read_report(report)["artifacts"])
    assert page.count('<figure class="kl">') == artifacts
    for kind, colour in colours.items():
        # a mark is about ten pixels inside its smoothed edge, and the poorest plot has three bars or forty marks
        assert pixels(picture, colour) > 100 * artifacts, kind


@pytest.mark.slow
def test_the_browser_test_sees_an_error_and_a_missing_plot(chromium: str, report: Path, tmp_path: Path) -> None:
    page = (report / "report.html").read_text("utf-8")
    bare = re.sub(r"<svg.*?</svg>", "", painted(page, "kl", "#fe00fe"), flags=re.DOTALL)
    (tmp_path / "page.html").write_text(bare.replace("<body>", "<body><script>nothing()</script>"), "utf-8")
    picture, console = shoot(chromium, tmp_path / "page.html")
    assert any("nothing is not defined" in line for line in console)
    assert pixels(picture, "#fe00fe") == 0
