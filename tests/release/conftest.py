from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from exporter.release.documents.write import write_documents
from exporter.release.facts import Artifact
from tests.release.finished import RUN, release, write_artifacts
from tests.release.projects import Project


@dataclass(frozen=True)
class Drafted:
    """Artifacts without documents; treat the folder as read-only."""

    folder: Path
    artifacts: tuple[Artifact, ...]

    def copy(self, to: Path) -> Path:
        return shutil.copytree(self.folder, to)


@pytest.fixture(scope="session")
def drafted(tiny_tied: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Drafted:
    folder = tmp_path_factory.mktemp("drafted") / "draft"
    return Drafted(folder, write_artifacts(folder, tiny_tied, tiny_adapter))


@pytest.fixture(scope="session")
def finished(drafted: Drafted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of one model with all its documents, unsigned; treat it as read-only."""
    folder = drafted.copy(tmp_path_factory.mktemp("finished") / "release")
    write_documents(folder, release(drafted.artifacts), RUN)
    return folder


@pytest.fixture(scope="session")
def several(
    tiny_tied: Path, tiny_adapter: Path, tiny_new_tokens_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A release of two models, each in a folder; treat it as read-only."""
    folder = tmp_path_factory.mktemp("several") / "release"
    artifacts = write_artifacts(folder, tiny_tied, tiny_adapter, folder="rows")
    artifacts += write_artifacts(folder, tiny_tied, tiny_new_tokens_adapter, folder="tokens")
    write_documents(folder, release(artifacts), RUN)
    return folder


@pytest.fixture(scope="session")
def _inputs(tiny_tied: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fixtures.adapters import stock_rows

    home = tmp_path_factory.mktemp("project") / "inputs"
    shutil.copytree(tiny_tied, home / "base")
    shutil.copytree(tiny_adapter, home / "one")
    stock_rows(tiny_tied, home / "two", (5, 301), seed=7)
    return home


@pytest.fixture
def project(_inputs: Path, tmp_path: Path) -> Project:
    """A tiny base with two row adapters, ``one`` and ``two``; copied for each test."""
    return Project(_inputs).copy(tmp_path / "project")


@pytest.fixture(scope="session")
def undisturbed(_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release of both adapters in the usual formats, verified by rows; treat it as read-only."""
    home = tmp_path_factory.mktemp("undisturbed")
    out = home / "release"
    assert Project(_inputs).copy(home / "project").write("one", "two").release(out) == 0
    return out
