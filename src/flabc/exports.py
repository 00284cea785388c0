"""Exporting: one folder in a precision that is given, or the fastest of several on this machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from flabc import artifact
from flabc.artifact import MANIFEST, Artifact
from flabc.console import note
from flabc.errors import EngineError, ParityError, UsageError
from flabc.export.precision import CANDIDATES, Storage
from flabc.frozen import Frozen
from flabc.runtime.measure.result import Sample, Workload
from flabc.source import Job, Source, model_folder
from flabc.spec import ModelSpec
from flabc.targets import Target, target_named

if TYPE_CHECKING:
    from flabc.export.tensorrt_plan import BuildOptions

#: The precision that is found by measuring.
AUTO = "auto"

#: The most that the fastest may differ from the model, KL in nats per token.
KL_BOUND = 0.02

#: What candidates are timed with: enough to tell them apart, a few seconds each.
RACE = Workload(prompt_tokens=128, output_tokens=32, rounds=3)


class Candidate(Frozen):
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


class Exported(Frozen):
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
        target: ``onnx``, for ONNX Runtime; ``openvino``, for OpenVINO on a processor; ``onnx-standard``, in operators
            of the ONNX standard alone; ``tensorrt``, the same with an engine built of it where there is a GPU; or
            ``gguf``, for llama.cpp, if all layers are equal and whole.
        precision: ``fp32`` (the default), ``fp16``, ``bf16``, and for ``onnx`` ``int8``, ``int4`` and ``auto``, the
            fastest on this machine; ``openvino`` has ``fp32``, ``int8`` and ``auto``; for ``tensorrt`` and ``gguf``
            ``fp16`` is the default, and ``gguf`` has ``int8``.
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
    with model_folder(str(model), tie=tie) as source:
        if source.manifest is not None and source.manifest.kind != "checkpoint":
            raise UsageError(f"{model} is an {source.manifest.kind}.", expected="a checkpoint, or a dense model")
        if name == AUTO:
            if storage not in (None, Storage()):
                raise UsageError("auto settles how matrices are stored.", fix="Leave the options away, or auto.")
            return _fastest(source, out, target, chosen, kl_bound=kl_bound, force=force)
        parity = _made(source, out, target, chosen, name, storage, force=force)
    return Exported(path=out, spec=source.spec, target=target, precision=name, parity=parity)


def _made(
    source: Source, out: Path, target: str, chosen: Target, precision: str, storage: Storage | None, *, force: bool
) -> dict[str, Any]:
    """Write a folder; its proof."""
    with artifact.create(out, chosen.kind, force=force) as draft:
        draft.spec, draft.target = source.spec, target
        if source.manifest is not None:
            draft.follow(source.manifest)
        parity = draft.receipts["parity"] = chosen.make(Job(source, draft.path, precision, storage))
        if source.manifest is None:
            draft.source = source.record
    return parity


def _fastest(source: Source, out: Path, target: str, chosen: Target, *, kl_bound: float, force: bool) -> Exported:
    """Make every candidate, time those that are near enough, keep the one that answers soonest."""
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the winner moves there without being copied.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.candidates-", dir=out.absolute().parent) as folder:
        places = [Path(folder) / str(at) for at in range(len(CANDIDATES[target]))]
        tried = [
            _try(source, place, target, chosen, *candidate, kl_bound)
            for place, candidate in zip(places, CANDIDATES[target], strict=True)
        ]
        near = [at for at, each in enumerate(tried) if not each.verdict]
        if not near:
            reasons = "; ".join(f"{each.precision}: {each.verdict}" for each in tried)
            raise ParityError(
                "No precision is near enough to the model.", found=reasons, fix="Give a larger --kl-bound."
            )
        table = _judged(tried, dict(zip(near, _timed([places[at] for at in near]), strict=True)))
        best = next(at for at, each in enumerate(table) if each.verdict == "fastest")
        made = Artifact.open(places[best]).manifest
        with artifact.create(out, chosen.kind, force=force) as draft:
            for file in places[best].iterdir():
                if file.name != MANIFEST:
                    shutil.move(file, draft.path / file.name)
            draft.follow(made)
            draft.spec, draft.target = made.spec, made.target
            draft.receipts["candidates"] = [each.model_dump() for each in table]
    return Exported(
        path=out,
        spec=source.spec,
        target=target,
        precision=table[best].precision,
        parity=made.receipts["parity"],
        candidates=table,
    )


def _try(
    source: Source, out: Path, target: str, chosen: Target, precision: str, storage: Storage, kl_bound: float
) -> Candidate:
    """Make and prove a candidate; its verdict says why it is out, if it is."""
    details = storage.model_dump(exclude_none=True)
    note(" ".join(["trying", precision, *(f"{key}={value}" for key, value in details.items())]))
    about: dict[str, Any] = {"precision": precision, "storage": details}
    try:
        kl = _made(source, out, target, chosen, precision, storage, force=False)["kl"]
    except (ParityError, EngineError) as error:
        return Candidate(**about, verdict=str(error))
    verdict = f"a KL of {kl:.2g} nats, more than {kl_bound:g}" if kl > kl_bound else ""
    return Candidate(**about, mib=artifact.folder_bytes(out) / 2**20, kl=kl, verdict=verdict)


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
