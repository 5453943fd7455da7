"""Optional packages: every extra that an error names installs the package that is missing."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

from exporter import packages
from exporter.errors import MissingDependency
from exporter.packages import Requirement, package_versions

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
SINGLE = (packages.LLAMA_CPP, packages.RAY, packages.MODEL_SIGNING, packages.TENSORBOARD)
ALL = (*SINGLE, *packages.REPORT, *packages.TRACE, *packages.TUNE)


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~ ]", requirement)[0].lower() for requirement in requirements}


@pytest.mark.parametrize("requirement", ALL, ids=lambda requirement: f"{requirement.install} {requirement.title}")
def test_the_extra_that_an_error_names_installs_the_package(requirement: Requirement) -> None:
    project = PYPROJECT["project"]
    extra = requirement.install.removeprefix("ttexport[").removesuffix("]")
    listed = names(project["dependencies"]) | names(project["optional-dependencies"][extra])
    assert requirement.title.lower() in listed


def test_one_missing_module_is_enough_to_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    requirement = Requirement(("json", "tomllib"), "json and tomllib", "ttexport")
    requirement.require("a test")
    monkeypatch.setitem(sys.modules, "tomllib", None)
    assert not requirement.is_installed()
    with pytest.raises(MissingDependency, match="a test needs json and tomllib; run pip install 'ttexport'"):
        requirement.require("a test")


def test_versions_keep_the_order_of_the_names_and_are_none_for_what_is_not_installed() -> None:
    found = package_versions(["numpy", "no-such-package", "gguf"])
    assert list(found) == ["numpy", "no-such-package", "gguf"]
    assert found["numpy"] == importlib.metadata.version("numpy")
    assert found["no-such-package"] is None


def test_every_file_of_the_packages_is_in_the_wheel() -> None:
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    root = Path(__file__).parents[1]
    packaged = {
        path
        for package, patterns in data.items()
        for folder in ([root / package.replace(".", "/")] if package != "*" else root.glob("*/"))
        for pattern in patterns
        for path in folder.glob(pattern)
    }
    files = [path for name in ("exporter", "tuner", "ttexport") for path in (root / name).rglob("*.*")]
    assert {path for path in files if path.suffix not in (".py", ".pyc")} - packaged == set()
    assert len(list((root / "exporter" / "models" / "data").glob("*.json"))) > 200
