"""One artifact to write: its format's own plan, or why the format cannot hold the model.

A format's modules are imported only when it is asked for: GGUF must not wait for ONNX, nor a patch for the merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from exporter.errors import NotExpressible
from exporter.formats.footprint import peak_nbytes, tracing_nbytes
from exporter.formats.target import DTYPES, Target, Wish
from exporter.progress import Progress

if TYPE_CHECKING:
    from exporter.formats.gguf.quantisation.file_types import FileType
    from exporter.formats.gguf.split import Split
    from exporter.merge.plan import MergePlan


def quants_for(fmt: str, formats: Sequence[str], quants: Sequence[str]) -> tuple[str, ...]:
    """What ``--quant`` asks of ``fmt``, in its spelling: GGUF's types in upper case, ONNX's names in lower case.

    Each is for one format: where both are written, for GGUF if it is named as a dtype or, like all of llama.cpp's
    quantisations, with an underscore. What the format does not know, it refuses.
    """
    if fmt not in formats or fmt not in ("gguf", "onnx"):
        return ()
    both = {"gguf", "onnx"} <= set(formats)
    meant = [(quant, "_" in quant or quant.lower() in DTYPES) for quant in quants]
    chosen = [quant for quant, is_gguf in meant if not both or is_gguf == (fmt == "gguf")]
    return tuple(quant.upper() if fmt == "gguf" else quant.lower() for quant in chosen)


def plan_target(fmt: str, wish: Wish, merge: MergePlan) -> Target:
    """Lay out one artifact; shapes only. Raises BadInput for inputs that no format could take."""
    try:
        target = FORMATS[fmt](wish, merge)
    except NotExpressible as refusal:
        return Target(format=fmt, storage=", ".join(wish.quants) or wish.dtype or "", refusal=refusal)
    casts = bool(wish.dtype or wish.quant) or fmt == "onnx"
    peak = target.peak_nbytes or peak_nbytes(fmt, merge, wish.budget, casts=casts, quantiser=target.estimated)
    return replace(target, peak_nbytes=peak)


def _hf(wish: Wish, merge: MergePlan) -> Target:
    from exporter.formats.hf.write import plan_hf, write_hf

    layout = plan_hf(merge.model(wish.dtype, wish.budget), wish.max_shard_bytes)
    stored = merge.checkpoint.tensors[merge.checkpoint.tie.embedding].spec.dtype
    return Target(format="hf", storage=wish.dtype or stored, nbytes=layout.nbytes, write=partial(write_hf, layout))


def _gguf(wish: Wish, merge: MergePlan) -> Target:
    target = _whole_gguf(wish, merge)
    if wish.split is None or target.write is None:
        return target
    # The whole file is cut in the end, so for a moment both lie on the disk.
    work = (target.work_nbytes or target.nbytes) + target.nbytes
    return replace(target, write=partial(_write_split, target.write, wish.split), work_nbytes=work, parts=True)


def _write_split(write: Callable[[Path, Progress], None], split: Split, path: Path, progress: Progress) -> None:
    from exporter.formats.gguf.split import split_file

    write(path, progress)
    split_file(path, split, progress)


def _whole_gguf(wish: Wish, merge: MergePlan) -> Target:
    from exporter.formats.gguf import plan_converter, plan_gguf, write_converted, write_gguf
    from exporter.formats.gguf.quantisation.file_types import FILE_TYPES

    overridden = wish.token_embedding_type or wish.output_tensor_type
    if not wish.converter and wish.quant in FILE_TYPES and (wish.quant != "Q8_0" or overridden):
        return _quantised_gguf(wish, merge, FILE_TYPES[wish.quant])
    # With a dtype asked for, base and rows are rounded once, by the writer; without one the stored dtype rules.
    model = merge.model("F32" if wish.dtype else None, wish.budget)
    if wish.converter:
        staged = plan_converter(model, wish.converter, wish.quant or wish.dtype)
        write = partial(write_converted, staged)
        return Target(format="gguf", storage=staged.ftype, nbytes=staged.nbytes, write=write)
    layout = plan_gguf(model, wish.quant or wish.dtype, pre_tokenizer=wish.pre_tokenizer)
    return Target(
        format="gguf", storage=layout.ftype, nbytes=layout.nbytes, write=partial(write_gguf, layout), notes=layout.notes
    )


def _quantised_gguf(wish: Wish, merge: MergePlan, file_type: FileType) -> Target:
    from exporter.formats.gguf import plan_gguf
    from exporter.formats.gguf.quantisation.files import Intermediate, plan_quantised, write_quantised

    if wish.dtype not in wish.intermediates:
        layout = plan_gguf(
            merge.model("F32" if wish.dtype else None, wish.budget),
            wish.dtype,
            pre_tokenizer=wish.pre_tokenizer,
            mixed="F32",
        )
        wish.intermediates[wish.dtype] = Intermediate(layout)
    quantised = plan_quantised(
        wish.intermediates[wish.dtype],
        file_type,
        imatrix=wish.imatrix,
        token_embedding_type=wish.token_embedding_type,
        output_tensor_type=wish.output_tensor_type,
    )
    return Target(
        format="gguf",
        storage=file_type.name,
        nbytes=quantised.nbytes,
        work_nbytes=quantised.work_nbytes,
        estimated=True,
        write=partial(write_quantised, quantised),
        notes=(*quantised.intermediate.layout.notes, *quantised.notes),
    )


def _onnx(wish: Wish, merge: MergePlan) -> Target:
    from exporter.families import describe
    from exporter.formats.onnx import choose, plan_onnx, write_onnx
    from exporter.formats.onnx.trace.plan import plan_traced, write_traced

    precisions = choose(wish.dtype, wish.quants)
    storage = ", ".join(one.name for one in precisions)
    model = merge.model("F32", wish.budget)
    try:
        describe(model.config, "onnx")
    except NotExpressible as refusal:
        if storage != "fp32" or wish.onnx_ops != "standard":
            reason = f"{refusal.reason}, and what is traced is written in fp32 with standard operators"
            raise NotExpressible("onnx", reason, instead="leave --dtype, --quant and --onnx-ops out") from refusal
        traced = plan_traced(model, refusal)
        return Target(
            format="onnx",
            storage=storage,
            nbytes=traced.nbytes,
            peak_nbytes=tracing_nbytes(traced.nbytes),
            write=partial(write_traced, traced),
            notes=traced.notes,
            way=traced.way,
        )
    layout = plan_onnx(model, precisions, ops=wish.onnx_ops)
    write = partial(write_onnx, layout)
    return Target(format="onnx", storage=storage, nbytes=layout.nbytes, write=write, way="family graph")


def _gguf_lora(wish: Wish, merge: MergePlan) -> Target:
    from exporter.formats.gguf.lora import plan_gguf_lora, write_gguf_lora

    layout = plan_gguf_lora(merge, wish.dtype or "F32")
    return Target(
        format="gguf-lora", storage=layout.dtype, nbytes=layout.nbytes, write=partial(write_gguf_lora, layout)
    )


#: The formats of ``--to``, in the order in which they are written.
FORMATS: Final = {"hf": _hf, "gguf": _gguf, "gguf-lora": _gguf_lora, "onnx": _onnx}
