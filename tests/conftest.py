"""The environment of all tests, and their order. Session fixtures are in ``tests/session``: a slow build happens once a
worker, when a test first asks for it.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning when a test starts another process
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# A worker a core: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections import Counter

import pytest

pytest_plugins = (
    "tests.session.encoder_decoders",
    "tests.session.made",
    "tests.session.smollm2",
    "tests.session.tiny",
    "tests.session.warm",
    "tests.session.wide",
    "tests.session.zoo",
    "tests.tiers.coverage",
    "tests.tiers.quick",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers of pytest-xdist begin with what takes longest, so that none is left alone with it at the end."""
    if not hasattr(config, "workerinput"):
        return
    sizes = Counter(item.path for item in items)
    marked = {mark: {item.path for item in items if item.get_closest_marker(mark)} for mark in ("smollm2", "slow")}
    items.sort(key=lambda item: (*(item.path not in paths for paths in marked.values()), -sizes[item.path]))
