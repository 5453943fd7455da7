"""Script that runs llama.cpp's function ``llama_model_quantize``. Usage: ``python -m … JOB.json``.

The script runs in a separate process, because llama.cpp aborts its process on some errors. The script prints progress
lines (number of the current tensor, number of all tensors) to stdout, and only error messages to stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import llama_cpp

from exporter.formats.gguf.quantisation.imatrix import Imatrix, read_imatrix
from exporter.sources.gguf.types import TYPE_NUMBERS

_ERROR: Final = 4  # GGML_LOG_LEVEL_ERROR
_STEP: Final = re.compile(rb"\[ *(\d+)/ *(\d+)\]")
#: Bytes of a tensor kept in memory. Rows are quantised independently, so the result does not depend on this number.
_BUFFER_BYTES: Final = 64 << 20
_STRING, _INT = 3, 0  # LLAMA_KV_OVERRIDE_TYPE_*


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]  # ctypes creates the decorator at run time
def _log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level == _ERROR:
        os.write(2, text)
    elif step := _STEP.match(text):
        os.write(1, b"%b %b\n" % step.groups())


def quantise(job: Mapping[str, Any]) -> int:
    """Quantise the file ``job["source"]`` to ``job["target"]``.

    Returns llama.cpp's exit code, which is 0 on success.
    """
    llama_cpp.llama_log_set(_log, ctypes.c_void_p())
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = job["number"]
    for field in ("token_embedding_type", "output_tensor_type"):
        if job[field]:
            setattr(params, field, TYPE_NUMBERS[job[field]])
    if hasattr(params, "max_buf_size"):  # this field is missing in older builds
        params.max_buf_size = _BUFFER_BYTES
    kept_alive = (
        _with_imatrix(params, read_imatrix(Path(job["imatrix"])), Path(job["imatrix"]).name) if job["imatrix"] else []
    )
    code: int = llama_cpp.llama_model_quantize(os.fsencode(job["source"]), os.fsencode(job["target"]), params)
    del kept_alive
    return code


def _with_imatrix(params: Any, imatrix: Imatrix, name: str) -> list[Any]:
    """Set the importance matrix in ``params``, as llama-quantize does, but without the importances of the vocabulary.

    Returns the buffers that the caller must keep alive during quantisation. The GGUF records only the file name of the
    importance matrix, without the folder, so that the GGUF's bytes do not depend on the folder.
    """
    used = imatrix.used
    entries = (llama_cpp.llama_model_imatrix_data * (len(used) + 1))()
    for entry, (tensor, values) in zip(entries, used.items(), strict=False):
        entry.name = tensor.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    keys: list[tuple[str, int | str]] = [("file", name)]
    keys += [("dataset", imatrix.datasets[0])] if imatrix.datasets else []
    keys.append(("entries_count", len(used)))
    keys += [("chunks_count", imatrix.chunks)] if imatrix.chunks > 0 else []
    overrides = (llama_cpp.llama_model_kv_override * (len(keys) + 1))()
    for override, (key, value) in zip(overrides, keys, strict=False):
        override.key = f"quantize.imatrix.{key}".encode()
        if isinstance(value, str):
            override.tag, override.value.val_str = _STRING, value.encode()[:127]
        else:
            override.tag, override.value.val_i64 = _INT, value
    params.imatrix, params.kv_overrides = entries, overrides
    return [entries, overrides, used]


if __name__ == "__main__":
    sys.exit(quantise(json.loads(Path(sys.argv[1]).read_text())))
