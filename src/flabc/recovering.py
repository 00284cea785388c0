"""Recovery put together: from a cut checkpoint and tasks to a trained checkpoint with its receipt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flabc import artifact
from flabc.artifact import Artifact
from flabc.compress import processes
from flabc.compress.config import Recovery
from flabc.console import note
from flabc.errors import EngineError, ModelError, RecoveryError, UsageError, require
from flabc.frozen import Frozen
from flabc.runtime.evaluate.source import read_jsonl
from flabc.runtime.evaluate.tasks import mined
from flabc.runtime.evaluate.tasks.humaneval import instruction
from flabc.source import model_folder
from flabc.spec import ModelSpec

if TYPE_CHECKING:
    from flabc.compress.data.examples import Example
    from flabc.compress.model import CausalLM
    from flabc.compress.recover import Trained

#: Documents of held-out text that are watched at most.
WATCHED_TEXTS = 32


class Recovered(Frozen):
    """What training did; losses are means over dev's tokens, in nats, and None where they do not count.

    ``before`` and ``after`` have ``loss``, ``ce``, ``kl`` and, a share, ``hidden``; ``data`` is the sha256 of what was
    trained on, ``processes`` how many trained together.
    """

    path: Path
    method: str
    kl_weight: float
    hidden_weight: float = 0.0
    teacher: str | None
    data: str
    examples: int
    dev_examples: int
    tokens: int
    steps: int
    best_step: int
    before: dict[str, float | None]
    after: dict[str, float | None]
    curve: tuple[dict[str, float], ...]
    processes: int = 1


def recover(
    checkpoint: str | Path,
    output: str | Path,
    *,
    data: str | Path | None = None,
    text: str | None = None,
    teacher: str | None = None,
    options: Recovery | None = None,
    device: str = "cpu",
    tensorboard: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
) -> Recovered:
    """Train a checkpoint and write another.

    States are kept in ``OUTPUT.partial`` until the end. Where several processes train together (``accelerate
    launch``), each returns, and the first one has written.

    Args:
        checkpoint: what ``compress`` wrote.
        output: the folder to write.
        data: JSON lines with ``prompt`` and ``canonical_solution``, or ``solution``, as ``flabc data mine`` writes.
        text: a corpus to train on as plain text, beside the tasks or in their place.
        teacher: whom to follow: the model that the checkpoint was cut from.
        options: how.
        device: a torch device.
        tensorboard: a folder for TensorBoard's logs.
        resume: go on with a run that was cut off.
        force: replace an output folder that is not empty, and begin a run anew that was cut off.

    Raises:
        RecoveryError: if there is nothing to train on, the loss is no number any more, or the processes share weights.
        MissingExtraError: if torch and its kin, or the package tensorboard where it is asked for, are not installed.
        UsageError: if arguments do not fit together, or a run was cut off and ``resume`` is not given.
        FlabcError: see ``flabc.errors``; the output folder is then as it was.
    """
    options = options or Recovery()
    processes.check()
    if processes.is_first():
        _check(options, output, data=data, text=text, teacher=teacher, resume=resume, force=force)
    for package in ("torch", "transformers", "peft"):
        require(package, "compress")
    if tensorboard is not None:
        require("tensorboard", "tensorboard")
    from flabc.compress import checkpoint as checkpoints
    from flabc.compress import devices, load, recover

    dtype = devices.dtype_named(options.dtype, devices.device_named(device))
    # A run goes on in the precision that it was begun in, or not at all.
    options = options.model_copy(update={"dtype": devices.name_of(dtype)})
    made = Artifact.open(checkpoint, "checkpoint")
    vocab_map = checkpoints.read_vocab_map(made.path)
    model = load.load(str(made.path))
    model = replace(model, token_origin=vocab_map or model.token_origin)
    train, dev = _examples(model, data, text, options)
    digest = _digest(train, dev)
    with ExitStack() as stack:
        source = stack.enter_context(model_folder(teacher)) if teacher else None
        identity = {
            "checkpoint": artifact.sha256(made.path / artifact.MANIFEST),
            "teacher": source.identity() if source else "",
            "data": digest,
            "options": options.model_dump(mode="json"),
            "processes": processes.count(),
        }
        begun = artifact.unfinished(output, identity, force=force and not resume)
        folder = stack.enter_context(processes.shared(begun, artifact.partial_of(output), device))
        followed = None
        if source is not None:
            ids = _teachers_ids(made.path, source.folder, model.token_origin)
            layers = _teachers_layers(made, model.spec, source.spec) if options.hidden_weight else ()
            followed = recover.as_teacher(recover.open_model(source.folder, source.spec, dtype), ids, layers, device)
        trained = recover.train(
            recover.open_model(made.path, model.spec),
            followed,
            train,
            dev,
            options,
            folder / "states",
            pad=_ends(model)[0],
            device=device,
            tensorboard=Path(tensorboard) if tensorboard is not None else None,
        )
        done = _told(trained, options, Path(output), teacher, digest, train, dev)
        if processes.is_first():
            _write(model, trained, done, made, options, force=force)
    return done


def _check(
    options: Recovery,
    output: str | Path,
    *,
    data: str | Path | None,
    text: str | None,
    teacher: str | None,
    resume: bool,
    force: bool,
) -> None:
    artifact.check_free(output, force=force)
    partial = artifact.partial_of(output)
    if partial.exists() and not (resume or force):
        raise UsageError(f"{partial} holds a run that was cut off.", fix="--resume goes on, --force begins anew.")
    if resume and not partial.exists():
        raise UsageError("There is no run to go on with.", expected=f"the folder {partial}", fix="Leave --resume away.")
    if data is None and text is None:
        raise UsageError("There is nothing to train on.", fix="Give --data TASKS.jsonl, --text CORPUS, or both.")
    if teacher is None and (options.method == "distill" or options.kl_weight or options.hidden_weight):
        raise UsageError("Distillation follows a teacher.", fix="Give --teacher, the model that was cut.")


def _examples(
    model: CausalLM, data: str | Path | None, text: str | None, options: Recovery
) -> tuple[list[Example], list[Example]]:
    """What is learnt and what is watched.

    Raises:
        RecoveryError: if one of them is empty.
    """
    from flabc.compress.data import corpus, examples
    from flabc.compress.stage import before_text, encoder

    tokenizer = encoder(model.tokenizer)
    begin, room = before_text(tokenizer), min(options.max_length, model.spec.max_position_embeddings)
    found: tuple[list[Example], list[Example]] = ([], [])
    if data is not None:
        for side, rows in zip(found, examples.sides(read_jsonl(Path(data))), strict=True):
            pairs = [_pair(model, row, chat=options.chat) for row in rows]
            opening = [] if options.chat else begin
            made = examples.of_pairs(pairs, tokenizer, begin=opening, end=_ends(model)[:1], max_length=room)
            side.extend(made)
            if len(made) < len(rows) and processes.is_first():
                note(f"{len(rows) - len(made)} of {len(rows)} rows leave no room for an answer in {room} tokens")
    if text is not None:
        documents = corpus.sides(text)
        for side, texts in zip(found, (documents["calibration"], documents["heldout"][:WATCHED_TEXTS]), strict=True):
            side.extend(examples.of_texts((each.text for each in texts), tokenizer, begin=begin, max_length=room))
    if not found[0] or not found[1]:
        raise RecoveryError(
            "There is too little to train on.",
            expected="examples to learn from and some on the side dev to watch",
            found=f"{len(found[0])} and {len(found[1])}",
            fix="Give more rows; one in ten is watched where none has the split dev.",
        )
    return found


def _pair(model: CausalLM, row: Mapping[str, Any], *, chat: bool) -> tuple[str, str]:
    """What is given and what is learnt of a row.

    Raises:
        UsageError: if a conversation is wanted and the model has no chat template.
    """
    from flabc.compress.chat import rendered

    solution = mined.solution(row)
    if not chat:
        return row["prompt"], solution
    asked = rendered(model.tokenizer, [{"role": "user", "content": instruction(row["prompt"])}], prompt=True)
    if asked is None:
        raise UsageError("The model has no chat template.", fix="Leave --chat away.")
    return asked, f"```python\n{row['prompt']}{solution}```"


def _teachers_ids(student: Path, teacher: Path, known: Sequence[int]) -> list[int]:
    """The teacher's id of each of the student's tokens.

    By what the tokens are: the map in the student's folder is of the model that it was cut from last, which need not be
    the teacher. Rows without a token keep what the map says.

    Raises:
        ModelError: if the student has tokens that the teacher lacks.
    """
    from flabc.runtime.evaluate.divergence import shared_ids
    from flabc.runtime.text import TextCodec

    try:
        ours, theirs = shared_ids(TextCodec(student), TextCodec(teacher))
    except EngineError as error:
        raise ModelError(
            f"The teacher is not the model that this one was cut from. {error}",
            fix="Give the dense model as --teacher.",
        ) from error
    ids = list(known)
    for index, its in zip(ours.tolist(), theirs.tolist(), strict=True):
        ids[index] = its
    return ids


def _teachers_layers(made: Artifact, student: ModelSpec, teacher: ModelSpec) -> Sequence[int]:
    """The teacher's number of each of the student's layers, by what the student's folder says that it was cut from.

    Raises:
        ModelError: if the folder does not say it, or the teacher has other layers or longer hidden states.
    """
    said = made.manifest.receipts.get("layers")
    if said is None:
        raise ModelError(
            f"{made.path} does not say which layers of the dense model it kept, so hidden states cannot be compared.",
            fix="Compress it anew with this version, or leave --hidden-weight away.",
        )
    expected, found = (said["of"], student.hidden_size), (len(teacher.layers), teacher.hidden_size)
    if expected != found:
        raise ModelError(
            "Hidden states are compared with those of the model that this one was cut from, and this is another.",
            expected="{} layers of hidden size {}".format(*expected),
            found="{} of {}".format(*found),
            fix="Give that model as --teacher, or leave --hidden-weight away.",
        )
    kept: Sequence[int] = said["kept"]
    return kept


def _ends(model: CausalLM) -> list[int]:
    """The ids that end an answer.

    Raises:
        RecoveryError: if the model names none.
    """
    given = model.generation_config.get("eos_token_id", model.config.get("eos_token_id"))
    ids = given if isinstance(given, list) else [given]
    if not ids or ids[0] is None:
        raise RecoveryError("The model does not say what ends an answer.", expected="eos_token_id in its config")
    return ids


def _digest(train: Sequence[Example], dev: Sequence[Example]) -> str:
    whole = sha256()
    for side in (train, dev):
        for example in side:
            whole.update(f"{example.given} {example.ids}\n".encode())
        whole.update(b"\n")
    return whole.hexdigest()


def _told(
    trained: Trained,
    options: Recovery,
    output: Path,
    teacher: str | None,
    digest: str,
    train: Sequence[Example],
    dev: Sequence[Example],
) -> Recovered:
    return Recovered(
        path=output,
        method=options.method,
        kl_weight=options.share_of_kl(teacher=teacher is not None),
        hidden_weight=options.hidden_weight,
        teacher=teacher,
        data=digest,
        examples=len(train),
        dev_examples=len(dev),
        tokens=trained.tokens,
        steps=trained.steps,
        best_step=trained.best_step,
        before=trained.before.named(),
        after=trained.after.named(),
        curve=tuple(dict(row) for row in trained.curve),
        processes=processes.count(),
    )


def _write(
    model: CausalLM, trained: Trained, done: Recovered, made: Artifact, options: Recovery, *, force: bool
) -> None:
    """The checkpoint, in the dtype that the cut one has."""
    from flabc.compress import card, checkpoint

    weights = {name: trained.weights[name].to(model.dtype) for name in model.spec.shapes()}
    with artifact.create(done.path, "checkpoint", force=force) as draft:
        checkpoint.write(replace(model, weights=weights), draft.path)
        card.go_on(made.path, draft.path, done.model_dump(mode="json"))
        draft.follow(made.manifest)
        draft.spec = model.spec
        receipt = done.model_dump(mode="json", exclude={"path"}) | {"options": options.model_dump(mode="json")}
        draft.receipts["recovery"] = [*draft.receipts.get("recovery", []), receipt]
