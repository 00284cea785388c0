"""Recovery: a cut model is trained, by transformers' Trainer, with adapters of peft or in all its weights.

The loss is the mean over the tokens that are learnt of ``(1 - w) * CE + w * KL(teacher || student) + h * D``; D is how
far hidden states are from the teacher's. A teacher with a larger vocabulary is cut to the student's tokens first
(``vocab_map.json`` says which): its distribution is over these.

Letters in shape comments: B sequences, T tokens of each, V the student's vocabulary, D hidden_size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from flabc.console import Advance
from flabc.errors import ModelError, RecoveryError
from flabc.families import family_named
from flabc.families.per_layer import has_own_module
from flabc.spec import ModelSpec

from . import processes
from .config import Recovery
from .data.examples import IGNORED, Example, collate, collate_packed, packed
from .devices import dtype_named
from .gguf_file import quiet_transformers

#: The loss on dev, as Trainer knows it.
_WATCHED = "eval_loss"


@dataclass(frozen=True)
class Losses:
    """Means over tokens: nats, ``hidden`` a share.

    Args:
        loss: what is trained on.
        ce: cross-entropy.
        kl: to the teacher; None without one.
        hidden: how far hidden states are from the teacher's; None where that does not count.
        tokens: how many.
    """

    loss: float
    ce: float
    kl: float | None
    hidden: float | None
    tokens: int

    def named(self) -> dict[str, float | None]:
        """The means by name."""
        return {"loss": self.loss, "ce": self.ce, "kl": self.kl, "hidden": self.hidden}


@dataclass(frozen=True)
class Teacher:
    """Who is followed.

    Args:
        model: a causal model of transformers that speaks in the student's ids.
        layers: which of its layers stands for each of the student's: a state behind the one is compared with that
            behind the other.
    """

    model: Any
    layers: Sequence[int]

    @torch.no_grad()
    def says(self, inputs: Mapping[str, Tensor], *, hidden: bool) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities of the next token, (B, T, V), and if asked the states behind the layers, (B, T, D) each."""
        said = self.model(**inputs, use_cache=False, output_hidden_states=hidden)
        states = [said.hidden_states[layer + 1] for layer in self.layers] if hidden else []
        return functional.log_softmax(said.logits.float(), dim=-1), states


@dataclass(frozen=True)
class Trained:
    """What training did.

    Args:
        weights: by their names in the checkpoint, float32.
        before, after: losses on dev; after is the best state's, which is kept.
        steps: optimiser steps done.
        best_step: the one whose state is kept.
        tokens: tokens learnt from, in all epochs.
        curve: losses by step, as Trainer logged them.
    """

    weights: Mapping[str, Tensor]
    before: Losses
    after: Losses
    steps: int
    best_step: int
    tokens: int
    curve: Sequence[Mapping[str, float]] = field(default=())


def open_model(folder: Path, spec: ModelSpec, dtype: torch.dtype = torch.float32) -> Any:
    """A folder's model in transformers.

    It is opened in its dtype, not converted: what positions are turned by stays in float32 then.

    Raises:
        EngineError: if the folder's module is not the one that flabc writes: it is not run then.
    """
    from transformers import AutoModelForCausalLM

    own = has_own_module(folder, family_named(spec.family))
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, trust_remote_code=own)


def token_losses(logits: Tensor, labels: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """Cross-entropy and KL(teacher || student), summed over the tokens that are learnt, and how many these are.

    Args:
        logits: the student's, (B, T, V).
        labels: ids or ``IGNORED``, (B, T); each is predicted by the position before it.
        teacher: the teacher's log-probabilities, (B, T, V).
    """
    wanted = labels[:, 1:] != IGNORED  # (B, T - 1)
    mine = functional.log_softmax(logits[:, :-1][wanted].float(), dim=-1)  # (learnt, V)
    ce = functional.nll_loss(mine, labels[:, 1:][wanted], reduction="sum")
    kl = None
    if teacher is not None:
        kl = functional.kl_div(mine, teacher[:, :-1][wanted], reduction="sum", log_target=True)
    return ce, kl, int(wanted.sum())


def hidden_distance(states: Sequence[Tensor], teachers: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The squared distance of hidden states, as a share of the teacher's square, mean over layers.

    A share, since a few tokens have states that are a thousand times larger than the others'.

    Args:
        states: the student's, behind each layer, (B, T, D) each.
        teachers: the teacher's.
        labels: ids or ``IGNORED``, (B, T); a state counts if the token that it predicts is learnt.

    Returns:
        the sum over the tokens that are learnt.
    """
    wanted = labels[:, 1:] != IGNORED  # (B, T - 1)
    found = []
    for mine, theirs in zip(states, teachers, strict=True):
        a, b = mine[:, :-1][wanted].float(), theirs[:, :-1][wanted].float()  # (learnt, D)
        found.append(((a - b).square().sum(-1) / b.square().sum(-1)).sum())
    return torch.stack(found).mean()


class _Trainer(Trainer):
    """Trainer with our loss. Its loss on dev is the mean over all tokens, whatever batches they came in."""

    loss_is_scaled_for_ga = True

    def __init__(
        self, *args: Any, teacher: Teacher | None, share: float, hidden: float, folder: Path, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.share, self.hidden, self.folder = teacher, share, hidden, folder
        self.model_accepts_loss_kwargs = True  # so that it counts the tokens of all batches of a step

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ce, kl, hidden, count = self._sums(model, inputs)
        total = ce * (1 - self.share)
        if kl is not None:
            total = total + kl * self.share
        if hidden is not None:
            total = total + hidden * self.hidden
        loss = total / (num_items_in_batch if num_items_in_batch is not None else max(1, count))
        if num_items_in_batch is not None:
            loss = loss * self.args.world_size  # the tokens are those of all processes, whose gradients are averaged
        check_finite(loss, self.state.global_step, self.folder)
        return loss

    def _sums(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        """Cross-entropy, KL and distance of hidden states, summed over the tokens that are learnt, and their count."""
        asked = {key: value for key, value in inputs.items() if key != "labels"}
        deep, labels = self.hidden > 0, inputs["labels"]
        theirs, states = self.teacher.says(asked, hidden=deep) if self.teacher is not None else (None, [])
        with self.compute_loss_context_manager():
            said = model(**asked, use_cache=False, output_hidden_states=deep)
        ce, kl, count = token_losses(said.logits, labels, theirs)
        return ce, kl, hidden_distance(said.hidden_states[1:], states, labels) if deep else None, count

    @torch.no_grad()
    def losses(self) -> Losses:
        """The losses on dev, each batch of which one process computes."""
        model: Any = self.model
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64)  # cross-entropy, KL, hidden states, tokens
        batches = DataLoader(self.eval_dataset, self.args.eval_batch_size, collate_fn=self.data_collator)  # type: ignore[arg-type]
        for number, inputs in enumerate(batches):
            if number % self.args.world_size == self.args.process_index:
                found = self._sums(model, self._prepare_inputs(inputs))
                sums += torch.tensor([float(each if each is not None else 0) for each in found], dtype=torch.float64)
        if self.args.world_size > 1:
            whole = sums.to(self.args.device)
            torch.distributed.all_reduce(whole)
            sums = whole.cpu()
        tokens = int(sums[3])
        ce, kl, hidden = (sums[:3] / max(1, tokens)).tolist()
        loss = ce * (1 - self.share) + kl * self.share + hidden * self.hidden
        return Losses(loss, ce, kl if self.teacher is not None else None, hidden if self.hidden else None, tokens)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {_WATCHED: self.losses().loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Teller(TrainerCallback):
    """Tells the person how far it is, and stops before numbers that are none get into the weights."""

    def __init__(self, advance: Advance, folder: Path) -> None:
        self.advance, self.folder = advance, folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)
        if state.global_step >= state.max_steps:
            control.should_evaluate = True  # the last state is kept too, and has to be compared

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        for name, said in (("loss", "training: loss"), (_WATCHED, "training: loss on dev")):
            if name in logs:
                self.advance(0, f"{said} {float(logs[name]):.4f}")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = kwargs["model"].parameters()
        sizes = [p.grad.detach().float().square().sum() for p in weights if p.grad is not None]
        check_finite(torch.stack(sizes).sum(), state.global_step, self.folder)


def check_finite(value: Tensor, step: int, folder: Path) -> None:
    """Stop when loss or gradients are no numbers any more.

    Raises:
        RecoveryError: naming the last state that was kept.
    """
    if torch.isfinite(value).all():
        return
    kept = _last_state(folder)
    raise RecoveryError(
        f"The loss or its gradient is no number any more after step {step}.",
        found=str(float(value.detach())),
        fix="Nothing was written; "
        + (f"the last good state is in {kept}. " if kept else "no state was kept yet. ")
        + "Train again with a lower --learning-rate, or more --warmup.",
    )


def train(
    model: Any,
    teacher: Teacher | None,
    examples: Sequence[Example],
    dev: Sequence[Example],
    options: Recovery,
    folder: Path,
    *,
    pad: int,
    device: str = "cpu",
    tensorboard: Path | None = None,
) -> Trained:
    """Train, going on from the last state in ``folder`` if there is one, and keep the state with the least dev loss.

    Args:
        model: a causal model of transformers; trained in place.
        teacher: who is followed, see ``as_teacher``; needed where the KL or hidden states count.
        examples: what is learnt.
        dev: what is watched.
        options: how.
        folder: where states are kept.
        pad: the id that fills sequences up.
        device: a torch device.
        tensorboard: where TensorBoard's logs go.

    Raises:
        RecoveryError: if the loss is no number any more, or the processes were started to share the weights (FSDP).
    """
    processes.check()
    share = options.share_of_kl(teacher=teacher is not None)
    names = set(model.state_dict())
    with _undisturbed():
        trained = _with_adapters(model, options) if options.method == "lora" else model
    if options.packing:
        data: tuple[Any, Any] = packed(examples, options.max_length), packed(dev, options.max_length)
    else:
        data = list(examples), list(dev)
    world = processes.count()
    steps = _steps(len(data[0]), options, world)
    with processes.told("training", steps) as advance, quiet_transformers(), _undisturbed():
        trainer = _Trainer(
            model=trained,
            args=_arguments(options, steps, folder, device),
            train_dataset=data[0],
            eval_dataset=data[1],
            data_collator=(collate_packed if options.packing else collate)(pad),
            callbacks=[_Teller(advance, folder), EarlyStoppingCallback(options.patience), *_logs(tensorboard)],
            teacher=teacher,
            share=share,
            hidden=options.hidden_weight,
            folder=folder,
        )
        trainer.remove_callback(PrinterCallback)
        before = trainer.losses()  # the model is as it came, until a state is loaded
        trainer.train(resume_from_checkpoint=_last_state(folder))
        after = trainer.losses()
    best = trainer.state.best_model_checkpoint
    whole = trained.merge_and_unload() if options.method == "lora" else trained
    return Trained(
        weights={name: tensor.detach().cpu() for name, tensor in whole.state_dict().items() if name in names},
        before=before,
        after=after,
        steps=trainer.state.global_step,
        best_step=int(best.rpartition("-")[2]) if best else trainer.state.global_step,
        tokens=_learnt(examples, trainer.state.epoch or 0.0),
        curve=[{key: float(value) for key, value in row.items()} for row in trainer.state.log_history],
    )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without what peft and Trainer say to each other's developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _last_state(folder: Path) -> str | None:
    if not folder.is_dir():
        return None
    found: str | None = get_last_checkpoint(str(folder))  # type: ignore[no-untyped-call]
    return found


def _learnt(examples: Sequence[Example], epochs: float) -> int:
    return round(sum(len(example.ids) - example.given for example in examples) * epochs)


def _logs(folder: Path | None) -> list[TrainerCallback]:
    """What writes for TensorBoard: transformers' own callback, in the first process."""
    if folder is None or not processes.is_first():
        return []
    from torch.utils.tensorboard import SummaryWriter

    return [TensorBoardCallback(SummaryWriter(str(folder)))]  # type: ignore[no-untyped-call]


def _steps(sequences: int, options: Recovery, world: int) -> int:
    per_epoch = math.ceil(math.ceil(sequences / (options.batch * world)) / options.accumulate)
    steps = max(1, math.ceil(per_epoch * options.epochs))
    return min(steps, options.max_steps or steps)


def _with_adapters(model: Any, options: Recovery) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(options.seed)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _arguments(options: Recovery, steps: int, folder: Path, device: str) -> TrainingArguments:
    every = max(1, steps // options.evaluations)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(options.warmup * steps),
        weight_decay=options.weight_decay,
        bf16=dtype_named(options.dtype, torch.device(device)) == torch.bfloat16,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,  # the best and the last
        logging_steps=max(1, min(10, every)),
        logging_nan_inf_filter=False,
        load_best_model_at_end=True,
        metric_for_best_model=_WATCHED,
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,  # or patience would begin anew when a run goes on
        seed=options.seed,
        use_cpu=device == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=device != "cpu",
        disable_tqdm=True,
        report_to=[],
    )


def as_teacher(model: Any, ids: Sequence[int], layers: Sequence[int], device: str) -> Teacher:
    """A model that speaks in the student's ids: in place, its vocabulary becomes the student's.

    Args:
        model: a causal model of transformers.
        ids: its id of each of the student's tokens, (V,).
        layers: the number that each of the student's layers has in it, where hidden states are compared. The student's
            last state is compared with its last, whatever went behind that layer.
        device: a torch device.

    Raises:
        ModelError: if the student has tokens that the teacher lacks.
    """
    theirs = int(model.config.vocab_size)
    if max(ids) >= theirs:
        raise ModelError(
            "The teacher is not the model that this one was cut from: it lacks some of its tokens.",
            expected=f"more than {max(ids)} rows",
            found=str(theirs),
            fix="Give the dense model as --teacher.",
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows, tied = torch.tensor(list(ids)), head.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight.detach()[rows], requires_grad=False)
    head.weight = embedding.weight if tied else nn.Parameter(head.weight.detach()[rows], requires_grad=False)
    embedding.padding_idx = None  # it says which row is not trained
    last = int(model.config.num_hidden_layers) - 1
    return Teacher(model.to(device).eval().requires_grad_(False), [*layers[:-1], last] if layers else ())
