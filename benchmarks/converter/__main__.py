"""Compare a merge by llama.cpp's converter, which reads an overlay, with the converter alone on the base.

The base has ``--gigabytes`` GB, and the adapter changes 4 token rows. ttexport is measured with the command that users
run, including the verification of the rows. The bytes that ttexport writes beside the GGUF are the largest total size
of the files in the output's hidden folder, without links and without the GGUF, sampled during all runs. The converter
alone ends while the GGUF is partly in memory, and ttexport ends after the GGUF is on disk, so the converter followed by
a sync to disk is measured as well. TTEXPORT_LLAMA_CPP names the folder of llama.cpp's converter.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks import _models
from benchmarks._cases import OURS, apart, case_parser, measure_case, show_cases
from benchmarks._measure import TTEXPORT, Program, machine, ratio, write

ALONE, SYNCED = "converter alone", "converter alone, synced"
_CASE = "overlay"
_ROWS = 4
_EMBED_BYTES = 2 * _models.VOCAB * _models.HIDDEN
# The bars: time relative to the converter, and bytes written beside the GGUF (the tied embedding and 10 MB).
BARS: Mapping[str, Mapping[str, float]] = {
    _CASE: {"time_over_converter": 1.15, "bytes_beside": _EMBED_BYTES + 10e6},
}
# llama.cpp does not know the hash of the arbitrary tokenizer, so the name of its pre-tokenizer is fixed.
_SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def main() -> None:
    parser = case_parser(__doc__, (_CASE,))
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size in GB of the base")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="converter-", dir=options.folder) as folder:
        programs = apart(_programs, Path(folder), options.gigabytes)
        with _watched(Path(folder)) as beside:
            case, measured = measure_case(_CASE, programs, options)
    case |= {"gigabytes": options.gigabytes, "embedding_bytes": _EMBED_BYTES, "bytes_beside": max(beside)}
    case["time_over_converter"] = ratio(measured[OURS].seconds, measured[ALONE].seconds)
    case["time_over_synced_converter"] = ratio(measured[OURS].seconds, measured[SYNCED].seconds)
    show_cases(f"GGUF of a merge by llama.cpp's converter, {options.rounds} rounds", [case], BARS, at_least=())
    print(f"written: {write('converter', {'machine': machine(), 'rounds': options.rounds, 'cases': [case]})}")


def _programs(folder: Path, gigabytes: float) -> dict[str, Program]:
    """Return the programs to measure. The base, the adapter and the converter's script are created in ``folder``."""
    root = os.environ.get("TTEXPORT_LLAMA_CPP")
    if root is None:
        raise SystemExit("benchmark: TTEXPORT_LLAMA_CPP: expected the path of llama.cpp's converter, found no value")
    script, out = folder / "convert.py", folder / "out.gguf"
    script.write_text(_SCRIPT.format(root=str(Path(root).resolve())))
    base = _models.checkpoint(folder / "base", _models.layers_for(gigabytes))
    _models.tokenizer(base)
    adapter = _models.row_adapter(folder / "adapter", base, _ROWS)
    ours = (*TTEXPORT, "merge", str(adapter), "--base", str(base), "--to", "gguf", "--converter", str(script))
    alone = (sys.executable, str(script), str(base), "--outtype", "bf16", "--outfile", str(out))
    return {
        OURS: Program((*ours, "-o", str(out)), out),
        ALONE: Program(alone, out),
        SYNCED: Program(("sh", "-c", f"{' '.join(alone)} && sync {out}"), out),
    }


@contextmanager
def _watched(folder: Path) -> Iterator[list[int]]:
    """Yield a list to which the size of the files in the hidden folders of ``folder`` is appended ten times a second.

    Links and GGUF files are not counted.
    """
    sizes, ended = [0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.1):
            hidden = [path for place in folder.glob(".*") for path in place.rglob("*")]
            sizes.append(sum(_nbytes(path) for path in hidden if path.suffix != ".gguf"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield sizes
    finally:
        ended.set()
        thread.join()


def _nbytes(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() and not path.is_symlink() else 0
    except FileNotFoundError:  # the file was deleted between the listing and this call
        return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
