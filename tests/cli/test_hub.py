"""Models and adapters from the hub, as users call the commands: over HTTP, then from the cache alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import shutil
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.sources.gguf.file import GgufFile
from fixtures.hub.server import serving
from tests.support.hub import Site

BASE_API = "/api/models/org/base"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def site(tmp_path: Path, tiny_sharded: Path, tiny_untied_adapter: Path) -> Iterator[Site]:
    """``org/base`` in three shards and ``user/adapter`` for it, with files that must not be fetched."""
    with serving() as hub:
        useless = {"pytorch_model.bin": b"x", "modeling.py": b"y", "consolidated.safetensors": b"z", "README.md": b"w"}
        hub.add("org/base", tiny_sharded, extra=useless)
        hub.add("user/adapter", tiny_untied_adapter, extra={"adapter_model.bin": b"x", "optimizer.pt": b"y"})
        yield Site(hub, tmp_path)


def test_a_merge_downloads_what_it_needs_and_the_next_one_is_offline_with_the_same_bytes(site: Site) -> None:
    arguments = ["merge", "user/adapter", "--base", "org/base", "--to", "gguf"]
    first = site.run(*arguments, "-o", "first.gguf")
    assert first.returncode == 0, first.stderr
    assert site.hub.fetched() == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    site.hub.requests.clear()
    second = site.run(*arguments, "-o", "second.gguf", offline=True)
    assert second.returncode == 0, second.stderr
    assert site.hub.requests == []
    work = site.home / "work"
    assert digest(work / "first.gguf") == digest(work / "second.gguf")
    metadata = GgufFile.open(work / "first.gguf").metadata
    commits = {name: repository.refs["main"] for name, repository in site.hub.repositories.items()}
    assert metadata["ttexport.base.repo"] == "org/base"
    assert metadata["ttexport.base.revision"] == commits["org/base"]
    assert metadata["ttexport.adapter.0.repo"] == "user/adapter"
    assert metadata["ttexport.adapter.0.revision"] == commits["user/adapter"]


@pytest.mark.parametrize("to", ["gguf", "onnx"])
def test_a_patch_records_the_same_origins_as_a_merge(site: Site, to: str) -> None:
    def content(name: str) -> dict[str, bytes]:
        whole = site.home / "work" / name
        files = [whole] if whole.is_file() else [path for path in sorted(whole.rglob("*")) if path.is_file()]
        return {path.relative_to(whole).as_posix(): path.read_bytes() for path in files}

    base, merged, patched, again = (
        f"{name}.gguf" if to == "gguf" else name for name in ("base", "merged", "patched", "again")
    )
    for arguments in (
        ["export", "org/base", "--to", to, "-o", base],
        ["merge", "user/adapter", "--base", "org/base", "--to", to, "-o", merged],
        ["patch", base, "user/adapter", "--base", "org/base", "-o", patched],
        ["patch", patched, "user/adapter", "--base", "org/base", "-o", again],
        ["patch", base, "user/adapter", "--base", "org/base", "--in-place"],
    ):
        done = site.run(*arguments, "-q")
        assert done.returncode == 0, done.stderr
    assert content(patched) == content(merged) == content(again) == content(base)
    assert any(b"ttexport.adapter.0.revision" in data for data in content(patched).values())


def test_a_release_from_the_hub_has_the_files_of_a_merge_and_records_commits(site: Site) -> None:
    work = site.home / "work"
    work.mkdir()
    (work / "release.toml").write_text(
        'name = "Lamp"\nversion = "1.0"\nbase = "org/base"\nmodels.one.adapters = ["user/adapter@main"]\n'
        'hf = {}\ngguf.types = ["Q8_0"]\nonnx = {}\nverify.level = "rows"\n'
    )
    merge = ["merge", "user/adapter", "--base", "org/base", "--to", "hf", "--to", "gguf", "--to", "onnx"]
    for arguments in (
        ["release", "release.toml", "-o", "out", "--no-cache"],
        [*merge, "--quant", "Q8_0", "-o", "merged"],
    ):
        done = site.run(*arguments, "-q")
        assert done.returncode == 0, done.stderr
    for place in ("hf", "gguf", "onnx"):
        released = {digest(path) for path in (work / "out" / place).rglob("*") if path.is_file()}
        assert released == {digest(path) for path in (work / "merged" / place).rglob("*") if path.is_file()}
    manifest = json.loads((work / "out" / "manifest.json").read_text())
    assert manifest["base"]["name"] == "org/base"
    assert manifest["base"]["revision"] == site.hub.repositories["org/base"].refs["main"]
    assert manifest["adapters"]["adapter"]["name"] == "user/adapter"


def test_a_complete_cache_is_used_without_requests_to_the_hub(site: Site) -> None:
    assert site.run("plan", "user/adapter", "--base", "org/base", "-q").returncode == 0
    site.hub.requests.clear()
    assert site.run("plan", "user/adapter", "--base", "org/base", "-q").returncode == 0
    assert site.hub.requests == []


def test_the_output_is_named_after_the_repository(site: Site) -> None:
    done = site.run("merge", "user/adapter", "--base", "org/base", "-q")
    assert (done.returncode, done.stdout) == (0, "adapter-hf\n")


def test_local_inputs_leave_no_path_in_the_artifact(site: Site, tiny_sharded: Path, tiny_untied_adapter: Path) -> None:
    done = site.run("merge", tiny_untied_adapter, "--base", tiny_sharded, "--to", "gguf", "-o", "x.gguf", "-q")
    assert done.returncode == 0, done.stderr
    ours = [key for key in GgufFile.open(site.home / "work" / "x.gguf").metadata if key.startswith("ttexport.")]
    assert ours == ["ttexport.adapters.sha256", "ttexport.base.embedding_sha256", "ttexport.rows.dtype"]


def test_a_revision_is_pinned_and_shown(site: Site, tiny_untied: Path) -> None:
    site.hub.add("org/base", tiny_untied, "v2", "main")
    old = min(site.hub.repositories["org/base"].commits.keys() - {site.hub.repositories["org/base"].refs["main"]})
    done = site.run("plan", "user/adapter", "--base", f"org/base@{old}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["origins"]["base.revision"] == old
    shown = site.run("inspect", "org/base@v2", "--json")
    facts = json.loads(shown.stdout)["facts"]
    assert (facts["repo"], facts["revision"]) == ("org/base", site.hub.repositories["org/base"].refs["v2"])
    assert old in site.run("plan", "user/adapter", "--base", f"org/base@{old}").stdout


def test_export_takes_a_checkpoint_or_an_adapter_from_the_hub(site: Site, tiny_untied_adapter: Path) -> None:
    assert site.run("--to", "gguf", "org/base", "-q").stdout == "base-BF16.gguf\n"
    folder = Path(shutil.copytree(tiny_untied_adapter, site.home / "naming"))
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    site.hub.add("user/naming", folder)
    assert site.run("--to", "gguf", "user/naming", "-q").stdout == "naming-BF16.gguf\n"


def test_an_artifact_is_verified_against_the_hub(site: Site) -> None:
    assert site.run("merge", "user/adapter", "--base", "org/base", "-o", "out", "-q").returncode == 0
    arguments = ["verify", "out", "--reference", "org/base", "--adapter", "user/adapter", "--level", "rows", "-q"]
    done = site.run(*arguments, offline=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("place", "fault", "message"),
    [
        (BASE_API, "gated", "accept the terms at"),
        (BASE_API, "unauthorised", "HTTP 401; log in with `hf auth login`, or set HF_TOKEN"),
        (BASE_API, "forbidden", "HTTP 403; log in"),
        (BASE_API, "broken", "HTTP 500; try again later"),
        (BASE_API, "drop", "check the network and try again"),
        ("/org/base/resolve", "drop", "check the network and try again"),
        ("/org/base/resolve", "gated", "accept the terms at"),
    ],
)
def test_a_hub_that_fails_is_one_line_and_leaves_nothing(place: str, fault: str, message: str, site: Site) -> None:
    site.hub.faults[place] = fault
    done = site.run("merge", "user/adapter", "--base", "org/base", "-o", "out", "-q")
    assert (done.returncode, done.stdout, site.left()) == (4, "", [])
    assert done.stderr.startswith("ttexport: --base: org/base@main: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["user/absent", "--base", "org/base"],
            "ADAPTER: user/absent@main: .*the repository does not exist or is private",
        ),
        (["user/adapter", "--base", "org/base@v9"], "--base: org/base@v9: .*no such revision"),
        (["user/adapter", "--base", "user/adapter"], "--base: user/adapter@main: config.json is missing"),
        (["org/base", "--base", "org/base"], "ADAPTER: org/base@main: adapter_config.json is missing"),
    ],
)
def test_a_missing_repository_or_revision_is_one_line(arguments: list[str], message: str, site: Site) -> None:
    done = site.run("merge", *arguments, "-o", "out", "-q")
    assert (done.returncode, done.stdout, site.left()) == (4, "", [])
    assert done.stderr.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(done.stderr)


def test_pickled_weights_are_not_fetched_but_named(site: Site, tiny_untied: Path) -> None:
    folder = Path(shutil.copytree(tiny_untied, site.home / "pickled"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    site.hub.add("org/pickled", folder)
    done = site.run("--to", "gguf", "org/pickled", "-q")
    assert done.returncode == 4
    assert (
        "model.safetensors is missing; found pickled weights (pytorch_model.bin), which ttexport does not read"
        in done.stderr
    )
    assert "pytorch_model.bin" not in site.hub.fetched()


def test_an_unreachable_hub_does_not_matter_if_the_cache_is_complete(site: Site) -> None:
    """Without a listing (single files, fetched by another tool) the hub is asked, and may not answer."""
    assert site.run("plan", "user/adapter", "--base", "org/base", "-q").returncode == 0
    for listing in (site.home / "hf" / "hub").glob("models--*/trees/*.json"):
        listing.unlink()
    site.hub.faults["/"] = "drop"
    assert site.run("plan", "user/adapter", "--base", "org/base", "-q").returncode == 0
    shard = next((site.home / "hf" / "hub").glob("models--org--base/snapshots/*/model-00002-of-00003.safetensors"))
    shard.resolve().unlink()
    done = site.run("plan", "user/adapter", "--base", "org/base", "-q")
    assert done.returncode == 4
    assert (
        "org/base@main: the local cache is incomplete: "
        "model-00002-of-00003.safetensors is missing, and the download from http" in done.stderr
    )


def test_an_interrupted_download_is_resumed(site: Site, tiny_untied: Path) -> None:
    site.hub.add("org/single", tiny_untied)
    commit = site.hub.repositories["org/single"].refs["main"]
    site.hub.faults[f"/org/single/resolve/{commit}/model.safetensors"] = "half"
    done = site.run("--to", "gguf", "org/single", "-o", "x.gguf", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    cached = next((site.home / "hf" / "hub").glob("models--org--single/snapshots/*/model.safetensors"))
    assert digest(cached) == digest(tiny_untied / "model.safetensors")
    asked = [line for line in site.hub.requests if line.startswith("GET") and line.endswith("/model.safetensors")]
    assert len(asked) == 2


def test_a_download_is_announced_unless_quiet(site: Site) -> None:
    talk = site.run("plan", "user/adapter", "--base", "org/base", "--json")
    assert talk.stderr.splitlines() == ["downloading user/adapter@main", "downloading org/base@main"]
    json.loads(talk.stdout)


def test_no_download_is_announced_offline(site: Site) -> None:
    done = site.run("plan", "user/adapter", "--base", "org/base", offline=True)
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_sees_bars_unless_quiet(quiet: bool, site: Site) -> None:
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))  # without a size a bar has no room
    arguments = ["plan", "user/adapter", "--base", "org/base", "--json", *(["-q"] if quiet else [])]
    done = site.run(*arguments, stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that its other end is closed
        while piece := os.read(reader, 1 << 16):  # a few bars: they fit the terminal's buffer
            shown += piece
    os.close(reader)
    json.loads(done.stdout)
    assert (b"100%" in shown) is not quiet
    if quiet:
        assert shown == b""
