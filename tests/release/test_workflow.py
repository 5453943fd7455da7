"""The workflow and the action for GitHub, as far as they can be tested without GitHub."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from exporter.cli.main import cli
from exporter.release.check import check_release

ROOT = Path(__file__).parents[2]
ACTION = ROOT / ".github/actions/ttexport/action.yml"
WORKFLOW = ROOT / ".github/workflows/release.yml"
ATTACH = ACTION.with_name("attach.sh")
FILES = (ACTION, WORKFLOW)
PINNED = re.compile(r"uses: [\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


def steps(path: Path) -> Iterator[Mapping[str, Any]]:
    document = read(path)
    for job in document["jobs"].values() if "jobs" in document else [document["runs"]]:
        yield from job["steps"]


def scripts() -> list[str]:
    return [step["run"] for path in FILES for step in steps(path) if "run" in step]


def commands() -> list[list[str]]:
    """The arguments of every call of ttexport, with variables of the shell unexpanded."""
    lines = [line for script in scripts() for line in script.replace("\\\n", " ").splitlines()]
    calls = [match[0] for line in lines for match in re.finditer(r"\bttexport [^|)]+", line) if "pip" not in line]
    return [shlex.split(arguments)[1:] for arguments in calls]


COMMANDS = commands()


def test_the_calls_are_all_found() -> None:
    verbs = [arguments[0] for arguments in COMMANDS]
    assert verbs.count("verify") == 2
    assert [
        sorted({"--matrix", "--only", "--assemble"} & set(arguments))
        for arguments in COMMANDS
        if arguments[0] == "release"
    ] == [
        [],
        ["--matrix"],
        ["--only"],
        ["--assemble"],
        ["--assemble"],
    ]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_the_command_line_takes_every_call(arguments: list[str]) -> None:
    verb, *rest = arguments
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    command.make_context(verb, list(rest))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_third_party_actions_are_pinned_by_commit(path: Path) -> None:
    used = [line.strip().removeprefix("- ") for line in path.read_text().splitlines() if "uses:" in line]
    used = [line for line in used if not line.startswith("#")]
    assert len(used) == sum("uses" in step for step in steps(path))
    assert [line for line in used if not (PINNED.fullmatch(line) or line.startswith("uses: ./.ttexport/"))] == []


def test_jobs_have_only_the_permissions_that_they_need() -> None:
    document = read(WORKFLOW)
    assert document["permissions"] == {}
    granted = {name: job["permissions"] for name, job in document["jobs"].items()}
    reads = {"contents": "read"}
    assert granted == {"plan": reads, "make": reads, "assemble": reads, "attach": {"contents": "write"}}


def test_the_job_that_may_write_runs_nothing_of_the_callers_repository() -> None:
    checked_out = [
        step["with"]["path"] for step in read(WORKFLOW)["jobs"]["attach"]["steps"] if "checkout" in str(step)
    ]
    assert checked_out == [".ttexport"]


def test_no_checkout_leaves_its_token_behind() -> None:
    checkouts = [step for step in steps(WORKFLOW) if "actions/checkout" in step.get("uses", "")]
    assert len(checkouts) == 7
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_inputs_reach_scripts_as_variables_only() -> None:
    """An expression inside a script would execute the content of the input."""
    assert [script for script in scripts() if "${{" in script] == []


def test_secrets_are_seen_by_the_steps_that_need_them() -> None:
    seen = {
        step["name"]: sorted(re.findall(r"secrets\.(\w+)", str(step)))
        for step in steps(WORKFLOW)
        if "secrets." in str(step)
    }
    assert seen == {
        "Make and verify one artifact": ["HF_TOKEN"],
        "Write the key to signing.pem": ["SIGNING_KEY"],
        "Join the artifacts and push them to the hub": ["HF_TOKEN"],
    }


@pytest.mark.parametrize("script", [*scripts(), ATTACH.read_text()])
def test_scripts_are_shell(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


GH = """#!/usr/bin/env bash
# Keeps what is uploaded, and knows no release before it is made.
echo "$*" >> "$GH_LOG"
case "$2" in
view) exit 1 ;;
upload) shift 4; cp "$@" "$GH_ASSETS" ;;
esac
"""


def attach(folder: Path, work: Path) -> Path:
    """Run the script with a stand-in for gh; return the folder of the assets."""
    assets = work / "assets"
    assets.mkdir(parents=True)
    (work / "gh").write_text(GH)
    (work / "gh").chmod(0o755)
    paths = {"PATH": f"{work}:{os.environ['PATH']}", "GH_LOG": str(work / "log"), "GH_ASSETS": str(assets)}
    subprocess.run([ATTACH, folder, "v1.0"], env={**os.environ, **paths}, check=True)
    return assets


def test_attached_files_unpack_to_the_release(finished: Path, tmp_path: Path) -> None:
    assets = attach(finished, tmp_path)
    assert sorted(path.name for path in assets.iterdir()) == [
        "SHA256SUMS",
        "manifest.json",
        "provenance.intoto.json",
        "release.tar",
        "rows-BF16.gguf",
        "rows-Q8_0.gguf",
    ]
    with tarfile.open(assets / "release.tar") as archive:
        archive.extractall(tmp_path / "back", filter="data")
    assert check_release(tmp_path / "back" / "release").passed
    log = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[1] for line in log] == ["view", "create", "upload"]
    assert log[1].startswith("release create v1.0 --draft")


def test_the_archive_of_the_same_release_has_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    archives = [attach(finished, tmp_path / name) / "release.tar" for name in ("one", "two")]
    assert archives[0].read_bytes() == archives[1].read_bytes()
