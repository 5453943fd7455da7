"""A forked child ends as a fresh interpreter does that runs the same module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.io import processes
from tests.session.warm import ForkServer, launch_fresh

_MODULE = """
import atexit, os, sys, signal
print(sys.argv[1:], os.environ.get("LAMP"), os.getcwd(), os.path.basename(sys.argv[0]), __name__, sys.path[0])
print(os.read(0, 1), file=sys.stderr)
atexit.register(print, "the end", file=sys.stderr)
exec(sys.argv[1])
"""


@pytest.fixture
def server() -> Iterator[ForkServer]:
    server = ForkServer(["json.tool"])
    yield server
    server.close()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the module ``ends`` in it."""
    (tmp_path / "ends.py").write_text(_MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("code", "returncode"),
    [
        ("pass", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('no lamp')", 1),
        ("os.write(2, b'\\xff')", 0),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("os._exit(5)", 5),
    ],
)
def test_a_forked_module_ends_as_in_a_fresh_interpreter(
    server: ForkServer, place: Path, code: str, returncode: int
) -> None:
    environment = {**os.environ, "LAMP": "lit"}
    fresh, forked = (launch("ends", (code, "é"), environment) for launch in (launch_fresh, server.launch))
    assert (forked.returncode, forked.stdout, forked.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)
    assert forked.returncode == returncode
    assert server.served == 1


def test_an_exception_is_the_last_line_of_both(server: ForkServer, place: Path) -> None:
    code = "raise ValueError('no lamp')"
    fresh, forked = (launch("ends", (code,), os.environ) for launch in (launch_fresh, server.launch))
    assert (forked.returncode, fresh.returncode) == (1, 1)
    assert "ValueError: no lamp" in forked.stderr.splitlines()
    assert forked.stderr.splitlines()[-2:] == fresh.stderr.splitlines()[-2:]


def test_children_know_nothing_of_each_other(server: ForkServer, place: Path) -> None:
    assert server.launch("ends", ("import fractions",), os.environ).returncode == 0
    assert server.launch("ends", ("assert 'fractions' not in sys.modules",), os.environ).returncode == 0
    assert server.served == 2


def test_a_variable_reaches_the_forked_module(server: ForkServer, place: Path) -> None:
    assert server.launch("ends", ("pass",), os.environ).stdout.split()[1] == "None"
    assert server.launch("ends", ("pass",), {**os.environ, "LAMP": "lit"}).stdout.split()[1] == "lit"
    assert server.served == 2


@pytest.mark.parametrize("seed", ["1", "2"])
def test_a_variable_that_imports_read_is_read_again(server: ForkServer, place: Path, seed: str) -> None:
    """As torch sets TORCHINDUCTOR_CACHE_DIR in the process of the tests, in the middle of a session."""
    arguments, environment = ("print(hash('lamp'))",), {**os.environ, "PYTHONHASHSEED": seed}
    assert server.launch("ends", ("pass",), os.environ).returncode == 0
    forked = server.launch("ends", arguments, environment)
    assert forked.stdout == launch_fresh("ends", arguments, environment).stdout
    assert server.served == 2


def test_modules_that_start_threads_are_not_forked(place: Path) -> None:
    (place / "threads.py").write_text("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()")
    server = ForkServer(["threads"])
    environment = {**os.environ, "PYTHONPATH": str(place)}
    assert server.launch("ends", ("print('lit')",), environment).stdout.endswith("lit\n")
    assert server.served == 0
    server.close()


def test_a_module_that_cannot_be_imported_is_named(place: Path) -> None:
    server = ForkServer(["lantern"])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="No module named 'lantern'"):
            server.launch("ends", ("pass",), os.environ)


def test_tests_of_the_start_itself_get_the_real_one(fresh_runtimes: None) -> None:
    assert processes.launch is launch_fresh


def test_the_tests_start_runtimes_through_the_fork_servers(warm_runtimes: dict[str, ForkServer]) -> None:
    assert processes.launch is not launch_fresh
    assert "exporter.verify.runtimes.reference" in warm_runtimes
