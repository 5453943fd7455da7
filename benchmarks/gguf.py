"""Compare conversion, quantisation and patching of GGUF files with llama.cpp's own tools and with ``cp``.

ttexport is measured with the commands that users run, including verification. The baseline uses the converter from the
llama.cpp source folder named by TTEXPORT_LLAMA_CPP and the quantiser from llama-cpp-python. The commands of ttexport
end after the data is on disk. ``cp`` ends while the copied data is still in memory, so ``cp`` followed by a sync to
disk is measured as well.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._cases import OURS, apart, case_parser, measure_case, show_cases
from benchmarks._measure import TTEXPORT, Program, machine, ratio, write

CASES = ("convert", "quantise", "large", "patch", "in-place", "inspect")
PEER, SYNCED = "peer", "cp, synced"
_QUANTISE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""
# The bars: speed relative to the peer, time relative to the peer, seconds, and peak memory.
BARS: Mapping[str, Mapping[str, float]] = {
    "convert": {"faster_than_peer": 8.0, "peak_bytes": 200e6},
    "quantise": {"faster_than_peer": 2.0},
    "large": {"time_over_peer": 1.5, "peak_bytes": 200e6},
    "patch": {"time_over_peer": 1.1, "peak_bytes": 150e6},
    "in-place": {"seconds": 0.5, "peak_bytes": 150e6},
    "inspect": {"seconds": 0.3},
}
_VOCAB, _HIDDEN, _INNER = 128_256, 2048, 8192


def main() -> None:
    parser = case_parser(__doc__, CASES)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size in GB of each large input file")
    options = parser.parse_args()
    cases = []
    for name in options.case or CASES:
        with tempfile.TemporaryDirectory(prefix="gguf-", dir=options.folder) as folder:
            programs = apart(_programs, name, Path(folder), options.gigabytes)
            case, measured = measure_case(name, programs, options)
            ours = case["variants"][OURS]
            case |= {"peak_bytes": ours["peak_bytes"], "seconds": ours["seconds_median"]}
            if PEER in measured:
                case["time_over_peer"] = ratio(measured[OURS].seconds, measured[PEER].seconds)
                case["faster_than_peer"] = ratio(measured[PEER].seconds, measured[OURS].seconds)
            cases.append(case)
    report(cases, options.rounds)


def _programs(name: str, folder: Path, gigabytes: float) -> dict[str, Program]:
    """Return the programs to measure in the benchmark case ``name``. Large input files are created in ``folder``."""
    out = folder / "out.gguf"
    if name in ("convert", "quantise"):
        return _smollm2(name, out)
    if name == "large":
        from benchmarks import _models

        base = _models.checkpoint(folder / "base", _models.layers_for(gigabytes))
        _models.tokenizer(base)
        copy = folder / "copy"
        shards = " ".join(str(path) for path in sorted(base.glob("*.safetensors")))
        return {
            OURS: Program((*TTEXPORT, "export", str(base), "--to", "gguf", "-o", str(out)), out),
            PEER: Program(("sh", "-c", f"mkdir {copy} && cp {shards} {copy}"), copy),
            SYNCED: Program(("sh", "-c", f"mkdir {copy} && cp {shards} {copy} && sync {copy}/*"), copy),
        }
    if name == "inspect":
        model = _q8_0(folder / "m.gguf", 0.5, vocab=150_000)
        command = " ".join(["exec", sys.executable, "-c", f"'{TTEXPORT[2]}'", "inspect", str(model)])
        return {OURS: Program(("sh", "-c", f"{command} > {out}"), out)}
    model = _q8_0(folder / "m.gguf", gigabytes, vocab=_VOCAB)
    adapters = [_rows(folder / f"adapter-{number}", number) for number in (1, 2)]
    if name == "patch":
        ours = (*TTEXPORT, "patch", str(model), str(adapters[0]), "--trust-base", "-o", str(out))
        return {
            OURS: Program(ours, out),
            PEER: Program(("cp", str(model), str(out)), out),
            SYNCED: Program(("sh", "-c", f"cp {model} {out} && sync {out}"), out),
        }
    # Two adapters are used in turn, because rows that are already in the file would not be written.
    turn, python = folder / "turn", f"exec {sys.executable} -c '{TTEXPORT[2]}'"
    choose = f"if [ -e {turn} ]; then rm {turn}; a={adapters[0]}; else touch {turn}; a={adapters[1]}; fi; touch {out}"
    command = f"{choose}; {python} patch {model} $a --trust-base --in-place"
    return {OURS: Program(("sh", "-c", command), out)}


def _smollm2(name: str, out: Path) -> dict[str, Program]:
    from fixtures import smollm2

    base = smollm2.checkpoint()
    root = os.environ.get("TTEXPORT_LLAMA_CPP")
    if root is None:
        raise SystemExit(
            "benchmark: TTEXPORT_LLAMA_CPP: expected the path of a llama.cpp source folder, found no value"
        )
    source = Path(root).resolve()
    converter = f"PYTHONPATH={source / 'gguf-py'} {sys.executable} {source / 'convert_hf_to_gguf.py'} {base}"
    ours = (*TTEXPORT, "export", str(base), "--to", "gguf", "-o", str(out))
    if name == "convert":
        return {
            OURS: Program(ours, out),
            PEER: Program(("sh", "-c", f"{converter} --outtype bf16 --outfile {out}"), out),
        }
    between, script = out.with_name("bf16.gguf"), out.with_name("quantise.py")
    script.write_text(_QUANTISE)
    peer = (
        f"{converter} --outtype bf16 --outfile {between} && {sys.executable} {script} {between} {out} && rm {between}"
    )
    return {OURS: Program((*ours, "--quant", "Q4_K_M"), out), PEER: Program(("sh", "-c", peer), out)}


def _q8_0(path: Path, gigabytes: float, *, vocab: int) -> Path:
    """Write a GGUF file of about ``gigabytes`` * 10^9 bytes in Q8_0, with a vocabulary and random Q8_0 blocks."""
    import numpy as np

    from exporter.formats.gguf import writer
    from exporter.formats.gguf.writer import TensorEntry

    entries = [TensorEntry("token_embd.weight", "Q8_0", (vocab, _HIDDEN))]
    while sum(entry.nbytes for entry in entries) < gigabytes * 1e9:
        entries.append(TensorEntry(f"blk.{len(entries)}.ffn_up.weight", "Q8_0", (_INNER, _HIDDEN)))
    keys = [
        writer.text("general.architecture", "llama"),
        writer.u32("llama.vocab_size", vocab),
        writer.texts("tokenizer.ggml.tokens", [f"token{number}" for number in range(vocab)]),
        writer.i32s("tokenizer.ggml.token_type", [1] * vocab),
    ]
    head, nbytes = writer.header(keys, entries)
    pool = np.random.default_rng(0).bytes(64 << 20)
    with path.open("wb") as file:
        file.write(head)
        while (left := nbytes - file.tell()) > 0:
            file.write(pool[:left])
        file.flush()
        os.fsync(file.fileno())
    return path


def _rows(folder: Path, seed: int) -> Path:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from benchmarks import _models

    adapter = _models.row_adapter(folder, folder)
    path = adapter / "adapter_model.safetensors"
    rows = {name: np.roll(value, seed, axis=1) for name, value in load_file(path).items()}
    save_file(rows, path, {"format": "pt"})
    return adapter


def report(cases: list[dict[str, Any]], rounds: int) -> None:
    show_cases(
        f"GGUF export, patch and inspection as separate processes, {rounds} rounds",
        cases,
        BARS,
        at_least=("faster_than_peer",),
    )
    print(f"written: {write('gguf', {'machine': machine(), 'rounds': rounds, 'cases': cases})}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
