"""SmolLM2 and an adapter for it. Treat the folders as read-only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.trained import SMOLLM2_IDS


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, from the user's cache; fetched and converted when absent."""

    from fixtures import smollm2 as smollm2_fixture

    return smollm2_fixture.checkpoint()


@pytest.fixture(scope="session")
def smollm2_adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four perturbed rows for SmolLM2."""

    from fixtures import adapters

    return adapters.stock_rows(smollm2, tmp_path_factory.mktemp("adapter") / "smollm2", SMOLLM2_IDS)
