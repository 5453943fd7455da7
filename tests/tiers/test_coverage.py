from __future__ import annotations

from tests.tiers.coverage import ROOT, figures, too_low


def test_lines_are_counted_by_room() -> None:
    lines = {
        ROOT / "exporter" / "errors.py": (10, 1),
        ROOT / "exporter" / "io" / "files.py": (30, 0),
        ROOT / "exporter" / "verify" / "gguf" / "layout.py": (50, 50),
        ROOT / "exporter" / "verify" / "run.py": (50, 0),
        ROOT / "tuner" / "__init__.py": (0, 0),
    }
    assert figures(lines) == {"exporter": 0.9, "exporter/io": 1.0, "exporter/verify": 0.5}


def test_a_room_below_its_floor_is_named_and_so_is_one_that_nothing_measured() -> None:
    shares = {"exporter/io": 0.9, "exporter/verify": 0.5}
    assert too_low(shares, {"exporter/io": 0.9, "exporter/verify": 0.6, "tuner": 0.1}) == ["exporter/verify", "tuner"]
