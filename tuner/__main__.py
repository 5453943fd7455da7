"""``python -m tuner``: runs the command ``ttexport tune`` on its own."""

from __future__ import annotations

from tuner.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
