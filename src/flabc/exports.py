"""Exporting: one folder in a precision that is given, or the fastest of several on this machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from flabc import artifact
from flabc.artifact import MANIFEST, Artifact, Draft, Manifest
from flabc.console import note
from flabc.errors import EngineError, ParityError, UsageError
from flabc.export.precision import CANDIDATES, Storage
from flabc.result import Result
from flabc.runtime.measure.result import Sample, Workload
from flabc.spec import ModelSpec
from flabc.targets import Job, Target, model_folder, target_named

if TYPE_CHECKING:
    from flabc.export.tensorrt_plan import BuildOptions

#: The precision that is found by measuring.
AUTO = "auto"

#: The most that the fastest may differ from the model, KL in nats per token.
KL_BOUND = 0.02

#: What candidates are timed with: enough to tell them apart, a few seconds each.
RACE = Workload(prompt_tokens=128, output_tokens=32, rounds=3)


class Candidate(Result):
    """A precision that was tried.

    Args:
        precision: its name.
        storage: what is changed about it.
        mib: size of the folder, MiB.
        kl: mean KL(model || engine) in nats; None if it failed its proof.
        prefill_tokens_per_s: of the prompt; None if it was not timed.
        decode_tokens_per_s: of the answer.
        total_ms: prompt and answer together, the median of the rounds.
        verdict: ``fastest``, ``slower``, or why it is out.
    """

    precision: str
    storage: dict[str, Any]
    mib: float | None = None
    kl: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    total_ms: float | None = None
    verdict: str = ""


class Exported(Result):
    """What exporting wrote, and how it compares with torch; ``candidates`` if the precision was found by measuring."""

    path: Path
    spec: ModelSpec
    target: str
    precision: str
    parity: dict[str, Any]
    candidates: tuple[Candidate, ...] = ()

    @property
    def missing(self) -> str | None:
        """Why the engine has not been built and how it can be, though all else was written; None if it is whole."""
        reason: str | None = self.parity.get("tensorrt", {}).get("missing")
        return reason


def export(
    model: str | Path,
    output: str | Path,
    *,
    target: str = "onnx",
    precision: str | None = None,
    storage: Storage | None = None,
    kl_bound: float = KL_BOUND,
    tie: bool = False,
    force: bool = False,
    build: BuildOptions | None = None,
) -> Exported:
    """Turn a checkpoint, or any dense model of a known family, into what serves, and prove it against torch.

    Args:
        model: a checkpoint folder, or whatever ``compress`` takes as a model.
        output: the folder to write.
        target: ``onnx``, for ONNX Runtime; ``onnx-standard``, in operators of the ONNX standard alone; ``tensorrt``,
            the same with an engine built of it where there is a GPU; or ``gguf``, for llama.cpp, if all layers are
            equal and whole.
        precision: ``fp32`` (the default), ``fp16``, ``bf16``, and for ``onnx`` ``int8``, ``int4`` and ``auto``, the
            fastest on this machine; for ``tensorrt`` and ``gguf`` ``fp16`` is the default, and ``gguf`` has ``int8``.
        storage: details of ``int8`` and ``int4``.
        kl_bound: for ``auto``, the most that the engine may differ from the model, KL in nats per token.
        tie: as for ``compress``.
        force: replace a folder that is not empty.
        build: for ``tensorrt`` alone, how it is built.

    Returns:
        what was written; its ``missing`` says if a TensorRT engine could not be built on this machine.

    Raises:
        ParityError: if the result's answers differ from torch's; no folder is written then.
        FlabcError: see ``flabc.errors``.
    """
    artifact.check_free(output, force=force)
    chosen, out = target_named(target, build), Path(output)
    if precision == AUTO and target not in CANDIDATES:
        raise UsageError(f"{target} has no candidates to choose from.", expected=", ".join(CANDIDATES))
    name = precision if precision == AUTO else chosen.precision(precision)
    with model_folder(str(model), tie=tie) as opened:
        source = _Source(*opened, name=Path(model).name)
        if name == AUTO:
            if storage not in (None, Storage()):
                raise UsageError("auto settles how matrices are stored.", fix="Leave the options away, or auto.")
            return _fastest(source, out, target, chosen, kl_bound=kl_bound, force=force)
        with artifact.create(out, chosen.kind, force=force) as draft:
            parity = _make(source, draft, target, chosen, name, storage)
    return Exported(path=out, spec=source.spec, target=target, precision=name, parity=parity)


class _Source:
    """What is exported: a folder, its spec, its manifest if it is an artifact, and the model's name."""

    def __init__(self, folder: Path, spec: ModelSpec, manifest: Manifest | None, *, name: str) -> None:
        self.folder, self.spec, self.manifest, self.name = folder, spec, manifest, name


def _make(
    source: _Source, draft: Draft, target: str, chosen: Target, precision: str, storage: Storage | None
) -> dict[str, Any]:
    """Fill a draft; its proof."""
    draft.spec, draft.target = source.spec, target
    parity = chosen.make(Job(source.folder, source.spec, draft.path, precision, storage, source.name))
    if source.manifest is not None:
        made = source.manifest
        draft.recipe, draft.source, draft.seed = made.recipe, made.source, made.seed
        draft.receipts = dict(made.receipts)
    draft.receipts["parity"] = parity
    return parity


def _fastest(source: _Source, out: Path, target: str, chosen: Target, *, kl_bound: float, force: bool) -> Exported:
    """Make every candidate, time those that are near enough, keep the one that answers soonest."""
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the winner moves there without being copied.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.candidates-", dir=out.absolute().parent) as folder:
        tried = [
            _try(source, Path(folder) / str(at), target, chosen, *candidate, kl_bound)
            for at, candidate in enumerate(CANDIDATES[target])
        ]
        near = {at: Path(folder) / str(at) for at, each in enumerate(tried) if not each.verdict}
        if not near:
            reasons = "; ".join(f"{each.precision}: {each.verdict}" for each in tried)
            raise ParityError(
                "No precision is near enough to the model.", found=reasons, fix="Give a larger --kl-bound."
            )
        times = dict(zip(near, _timed(list(near.values())), strict=True))
        table = _judged(tried, times)
        best = next(at for at, each in enumerate(table) if each.verdict == "fastest")
        manifest = Artifact.open(near[best]).manifest
        with artifact.create(out, chosen.kind, force=force) as draft:
            for file in near[best].iterdir():
                if file.name != MANIFEST:
                    shutil.move(file, draft.path / file.name)
            draft.spec, draft.target = manifest.spec, manifest.target
            draft.recipe, draft.source, draft.seed = manifest.recipe, manifest.source, manifest.seed
            draft.receipts = {**manifest.receipts, "candidates": [each.model_dump() for each in table]}
    parity = manifest.receipts["parity"]
    return Exported(
        path=out, spec=source.spec, target=target, precision=table[best].precision, parity=parity, candidates=table
    )


def _try(
    source: _Source, out: Path, target: str, chosen: Target, precision: str, storage: Storage, kl_bound: float
) -> Candidate:
    """Make and prove a candidate; its verdict says why it is out, if it is."""
    details = storage.model_dump(exclude_none=True)
    note(" ".join(["trying", precision, *(f"{key}={value}" for key, value in details.items())]))
    about: dict[str, Any] = {"precision": precision, "storage": details}
    try:
        with artifact.create(out, chosen.kind) as draft:
            kl = _make(source, draft, target, chosen, precision, storage)["kl"]
    except (ParityError, EngineError) as error:
        return Candidate(**about, verdict=str(error))
    size = sum(file.stat().st_size for file in out.iterdir()) / 2**20
    verdict = f"a KL of {kl:.2g} nats, more than {kl_bound:g}" if kl > kl_bound else ""
    return Candidate(**about, mib=size, kl=kl, verdict=verdict)


def _timed(engines: Sequence[Path]) -> list[list[Sample]]:
    from flabc.compress.data.corpus import load
    from flabc.runtime.measure.race import race

    return race(engines, RACE, [document.text for document in load("python-stdlib", "heldout")])


def _judged(tried: Sequence[Candidate], times: Mapping[int, Sequence[Sample]]) -> tuple[Candidate, ...]:
    """The candidates with their times and verdicts."""
    total = {at: median(sample.total_ms for sample in samples) for at, samples in times.items()}
    best = min(total, key=total.__getitem__)

    def judged(at: int, candidate: Candidate) -> Candidate:
        if at not in times:
            return candidate
        figures = {
            "prefill_tokens_per_s": 1000 * RACE.prompt_tokens / median(s.ttft_ms for s in times[at]),
            "decode_tokens_per_s": 1000 / median(s.tpot_ms for s in times[at]),
            "total_ms": total[at],
        }
        return candidate.model_copy(update={**figures, "verdict": "fastest" if at == best else "slower"})

    return tuple(judged(at, candidate) for at, candidate in enumerate(tried))
