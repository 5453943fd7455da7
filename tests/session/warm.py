"""Runtimes whose imports are paid once a session.

The process of a runtime imports torch and transformers for seconds, and computes a tiny model in a fraction of one.
``warm_runtimes`` replaces only the start of that process: it is forked from one that has imported the same packages
(``tests/session/fork_server.py``). Module, arguments, environment, files, exit code and stderr stay the real ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import IO, Final

import pytest

from exporter.io import processes
from tests.tiers.guard.sitecustomize import NotQuick

Ended = subprocess.CompletedProcess[str]

ROOT: Final = Path(__file__).parents[2]
#: Variables that the imports read. All others reach the forked process as they are.
_READ_BY_IMPORTS: Final = ("HF_", "LD_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "TOKENIZERS_", "TORCH", "TRANSFORMERS_")
launch_fresh: Final = processes.launch


@dataclass
class ForkServer:
    """The process that forks the runtimes ``modules``, started by the first of them.

    imports: what they import only when they load a model.  served: how many it has run.
    """

    modules: Sequence[str]
    imports: Sequence[str] = ()
    served: int = 0
    _process: subprocess.Popen[str] | None = None
    _environment: Mapping[str, str] = field(default_factory=dict)
    _log: IO[bytes] = field(default_factory=BytesIO)
    _threads: int = 0
    _lock: Lock = field(default_factory=Lock)

    def launch(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Ended:
        """As ``processes.launch``.

        If the variables that imports read have changed since the imports, a new process makes the imports. If the
        imports started a thread, as OpenBLAS does where OMP_NUM_THREADS allows two, the interpreter is a fresh one: a
        process is forked safely only while it has one thread.
        """
        with self._lock:
            read = {name: value for name, value in environment.items() if name.startswith(_READ_BY_IMPORTS)}
            try:
                if read != self._environment:
                    self.close()
                if self._process is None:
                    self._start(environment, read)
                if self._threads == 1:
                    return self._fork(module, arguments, environment)
            except BaseException:
                self.close()  # subprocess.run, too, ends the child that it can no longer wait for
                raise
            return launch_fresh(module, arguments, environment)

    def close(self) -> None:
        """End the process and its child."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None
            self._log.close()

    def _start(self, environment: Mapping[str, str], read: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.session.fork_server", ",".join(self.modules), *self.imports],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self._environment = read
        self._threads = self._answer()

    def _fork(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Ended:
        assert self._process is not None
        assert self._process.stdin is not None
        with tempfile.TemporaryDirectory() as folder:
            stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
            stdout.touch()
            stderr.touch()
            job = {"module": module, "arguments": list(arguments), "environment": dict(environment)}
            places = {"folder": os.getcwd(), "stdout": str(stdout), "stderr": str(stderr)}
            print(json.dumps(job | places), file=self._process.stdin, flush=True)
            code = self._answer()
            self.served += 1
            said = (path.read_text(encoding="utf-8", errors="replace") for path in (stdout, stderr))
            return Ended([module, *arguments], code, *said)

    def _answer(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"the process that forks {self.modules} ended: {self._log.read()[-2000:].decode()}")
        return int(line)


def servers() -> list[ForkServer]:
    """One process for what computes with torch, one for the runtimes that hide torch from transformers.

    ONNX Runtime and llama.cpp are imported in a tenth of a second, and the former starts a thread: both start afresh.
    """
    names = ("reference", "merged", "gguf_in_transformers")
    by_peft = [f"exporter.{room}.by_peft.process" for room in ("merge", "verify")]
    computing = [*(f"exporter.verify.runtimes.{name}" for name in names), *by_peft]
    models = ("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama")
    on_demand = (*models, "peft.utils.transformers_weight_conversion", "torch._dynamo")
    tokenizers = ("transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_tokenizers")
    return [
        ForkServer([*computing, "exporter.formats.onnx.trace.decoder"], on_demand),
        ForkServer([f"exporter.verify.runtimes.{name}" for name in ("texts", "tokens.gguf")], tokenizers),
    ]


@pytest.fixture(scope="session", autouse=True)
def warm_runtimes(pytestconfig: pytest.Config) -> Iterator[Mapping[str, ForkServer]]:
    """Module → the process that forks it. ``fresh_runtimes`` is for tests of the start itself."""
    started = servers()
    warm = {module: server for server in started for module in server.modules}

    def launch(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Ended:
        if pytestconfig.getoption("--quick"):
            raise NotQuick(f"{module} was started")
        start = warm[module].launch if module in warm else launch_fresh
        return start(module, arguments, environment)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "launch", launch)
        if pytestconfig.getoption("--quick"):  # the check of tokenised texts starts a process in every verification
            patch.setattr("exporter.verify.tokenised.check.installed", lambda name: False)
        yield warm
    for server in started:
        server.close()


@pytest.fixture
def fresh_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every runtime in a fresh interpreter, as users run it."""
    monkeypatch.setattr(processes, "launch", launch_fresh)
