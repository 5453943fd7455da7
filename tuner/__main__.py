"""``python -m tuner``: the command ``ttexport tune`` alone."""

from __future__ import annotations

from tuner.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
