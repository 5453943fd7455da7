"""Run a requested verification: locate and open the files, verify the artifacts, and write the reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporter.progress import Hooks
from exporter.sources.detect import detect
from exporter.sources.hf.full_precision import require_convertible
from exporter.sources.hub.base_check import check_base
from exporter.sources.hub.locate import locate
from exporter.verify.expect.reference import Reference
from exporter.verify.formats import adapter_format, find_artifacts
from exporter.verify.options import VerifyOptions
from exporter.verify.report import Report
from exporter.verify.reports.setting import setting
from exporter.verify.reports.write import require_renderers, write_report
from exporter.verify.run import verify
from exporter.verify.running.prompts import read_prompts
from exporter.verify.runtimes.installed import require


@dataclass(frozen=True, kw_only=True)
class VerifyRequest:
    """A request to verify ``artifact`` against the base ``reference`` with the unmerged adapters ``adapters``.

    artifact: the path of a .gguf file, an ONNX folder, a checkpoint folder, or a folder that contains artifacts in
    several formats. reference: the path or Hugging Face Hub id of the base checkpoint. adapters: the paths or Hugging
    Face Hub ids of the adapters. untie, drop_unused: True if the artifact was merged with
    --untie or --drop-unused-tokens. trust_base: True to accept a
    reference that differs from the base model recorded in an adapter. quiet: True to hide progress bars during
    downloads.
    """

    artifact: Path
    reference: str
    adapters: tuple[str, ...] = ()
    untie: bool = False
    drop_unused: bool = False
    trust_base: bool = False
    options: VerifyOptions
    quiet: bool = False


def require_verifiable(options: VerifyOptions, *, needed_for: str) -> list[str]:
    """Check that all packages that ``options`` require are installed, then read and return the user's prompts.

    needed_for: the option or config key that required the runtimes; the error message contains ``needed_for``.

    Raises MissingDependency if a required package is not installed, and UnreadableFile if the prompts file cannot be
    read.
    """
    require(options.require, needed_for=needed_for)
    if options.report:
        require_renderers()
    return read_prompts(options.prompts) if options.prompts else []


def verify_request(request: VerifyRequest, hooks: Hooks) -> list[Report]:
    """Verify all artifacts in the path ``request.artifact``, and return one report per artifact.

    The reports are also written to the folder ``options.report``, if the option is set. A failed check is recorded in
    its report and does not raise an exception.

    Raises BadInput, NotExpressible or MissingDependency if the verification cannot be run, and OutputError if the
    reports cannot be written.
    """
    options, quiet = request.options, request.quiet
    prompts = require_verifiable(options, needed_for="--require")
    checkpoint = locate(request.reference, asked_by="--reference", content="checkpoint", quiet=quiet)
    adapters = [
        locate(adapter, asked_by="--adapter", content="adapter", quiet=quiet).path for adapter in request.adapters
    ]
    reference = Reference.open(checkpoint.path, adapters, untie=request.untie, drop_unused=request.drop_unused)
    untie, trust = request.untie, request.trust_base
    for warning in check_base(checkpoint, reference.checkpoint, reference.adapters, untie=untie, trust=trust):
        hooks.say(f"warning: {warning}")
    paths = find_artifacts(request.artifact)
    if options.level != "rows":
        for path in (path for path in paths if adapter_format(path) or detect(path) != "hf"):
            require_convertible(reference.checkpoint, f"verify: {path}")
    reports = verify(paths, reference, level=options.level, prompts=prompts, required=options.require, say=hooks.say)
    if options.report:
        write_report(options.report, reports, setting(reference, paths))
    return reports
