from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from exporter.errors import OutputError

ROOT = Path(__file__).parents[2]

RESERVED = """
import resource, sys
from pathlib import Path
from exporter.errors import OutputError
from exporter.io.output import OutputFile
out = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
try:
    with OutputFile(out, nbytes=4 << 20) as file:
        file.write(bytes(1 << 20))
        raise AssertionError("the file exceeds the limit")
except OutputError as exc:
    assert str(exc) == f"{out}: File too large", exc
assert not out.exists()
"""


def test_missing_space_is_reported_before_the_work_is_done(tmp_path: Path) -> None:
    command = [sys.executable, "-B", "-c", RESERVED, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


LIMITED = """
import errno, os, resource, sys
limit = int(sys.argv[1])
if sys.argv[2] == "no kernel copy":
    def refused(*_): raise OSError(errno.EXDEV, "refused")
    os.copy_file_range = refused
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from exporter.cli.main import run
sys.exit(run(sys.argv[3:]))
"""


@pytest.mark.parametrize("kernel", ["kernel copy", "no kernel copy"])
@pytest.mark.parametrize("limit", [100, 70_000, 150_000])
def test_a_limit_of_the_file_size_ends_a_merge_with_exit_7_and_nothing_left(
    kernel: str, limit: int, tiny_adapter: Path, tiny_tied: Path, tmp_path: Path
) -> None:
    arguments = ["merge", tiny_adapter, "--base", tiny_tied, "-o", tmp_path / "out"]
    command = [sys.executable, "-B", "-c", LIMITED, str(limit), kernel, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == OutputError.exit_code
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("ttexport: ")]
    assert list(tmp_path.iterdir()) == []
