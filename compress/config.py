"""What a recipe can say about compressing: frozen data, no action.

Each stage has one config; the field ``stage`` tells them apart. Names of criteria and scores come from the
registries of the modules that implement them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, ByteSize, Field, WithJsonSchema, model_validator

from flabc.errors import UnknownNameError
from flabc.frozen import Frozen
from flabc.spec import BYTES_PER_PARAMETER

from .allocate import ALLOCATIONS
from .criteria import CRITERIA
from .data.corpus import CORPORA
from .score import SCORES


def known(kind: str, names: Iterable[str]) -> tuple[AfterValidator, WithJsonSchema]:
    """Annotations for a string that must be a registered name; editors are offered the choice."""
    choices = sorted(names)

    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(str(UnknownNameError(kind, value, choices)))
        return value

    return AfterValidator(check), WithJsonSchema({"type": "string", "enum": choices})


class Amount(Frozen):
    """A config with fields of which at most one says how much."""

    #: Names of these fields.
    amounts: ClassVar[tuple[str, ...]] = ()

    @property
    def given(self) -> list[str]:
        """Which of these fields say something."""
        return [name for name in self.amounts if getattr(self, name) is not None]

    @property
    def takes_the_rest(self) -> bool:
        """Whether there are such fields and none says anything: then it is what the target still needs."""
        return bool(self.amounts) and not self.given

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if len(self.given) > 1:
            raise ValueError(f"give at most one of {' and '.join(map(repr, self.amounts))}")
        return self


class Target(Amount):
    """How much of the model is to be left over; stages cut until it is reached, and no further."""

    amounts = ("params", "block_params", "bytes")
    params: Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(gt=1)] | None = Field(
        None, description="Parameters to keep: a fraction of the dense model's, or a number."
    )
    block_params: float | None = Field(
        None, gt=0, lt=1, description="Fraction of the parameters inside the layers to keep, vocabulary not counted."
    )
    bytes: ByteSize | None = Field(None, gt=0, description="Bytes of the weights at 'precision', e.g. 300MB or 1GiB.")
    precision: Annotated[str, *known("precision", BYTES_PER_PARAMETER)] = Field(
        "bf16", description="What 'bytes' counts in."
    )

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.given:
            raise ValueError(f"give one of {', '.join(map(repr, self.amounts))}")
        return self


#: One corpus or several.
Corpora = str | Annotated[tuple[str, ...], Field(min_length=1)]

_CORPORA = f"A built-in corpus ({', '.join(CORPORA)}), a path of text, JSON lines or parquet, or hf:owner/name."


class Calibration(Frozen):
    """The text on which the model is listened to while it is cut."""

    corpus: Corpora = Field("python-stdlib", description=f"{_CORPORA} Several count alike.")
    sequences: int = Field(48, gt=0, description="Token sequences for scores and statistics.")
    sequence_length: int = Field(512, gt=1, description="Tokens per sequence.")
    first_tokens: float = Field(
        1 / 128,
        ge=0,
        description="As many tokens again, as a share of those of the sequences, that fits hear each as the first of a "
        "text: every text depends on what the model makes of its first. Not where the tokenizer puts one there itself.",
    )
    generated: bool = Field(
        False,
        description="Count as one corpus more what the dense model writes itself, going on from beginnings of the "
        "others: what it reads most of where it serves.",
    )


class VocabConfig(Amount):
    """Keep the tokens that the corpus needs, and everything that the tokenizer needs to make them."""

    stage: Literal["vocab"] = "vocab"
    corpus: Corpora | None = Field(
        None, description=f"{_CORPORA} Several count alike; without it, what the model is calibrated on."
    )
    coverage: float = Field(
        1.0, gt=0, le=1, description="Keep the most frequent tokens that make up this share of the corpus."
    )
    max_size: int | None = Field(None, gt=0, description="Rows at most; the least frequent leaves go first.")
    multiple_of: int = Field(64, gt=0, description="The number of rows is a multiple of this.")


class LayersConfig(Amount):
    """Remove layers or sub-blocks one after another, each time the one whose absence costs least."""

    stage: Literal["layers"] = "layers"
    amounts = ("fraction", "count")
    parts: Literal["layers", "attention", "ffn", "sub_blocks"] = Field(
        "layers",
        description="What is removed: whole layers, their attention, their FFN, or either. A model that lost "
        "sub-blocks loads in transformers with trust_remote_code, by a small module in its folder.",
    )
    fraction: float | None = Field(None, gt=0, lt=1, description="Share of these parts to remove.")
    count: int | None = Field(
        None, gt=0, description="Number of these parts to remove; without it and 'fraction', what the target needs."
    )
    criterion: Annotated[str, *known("criterion", CRITERIA)] = Field("kl", description="What absence costs.")
    order: Literal["greedy", "one_shot", "consecutive"] = Field(
        "greedy",
        description="Measure anew after each removal; or once, and take the cheapest; or one run of layers.",
    )
    sequences: int = Field(8, gt=0, description="Sequences to compare on: ranking layers needs fewer than statistics.")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.order == "consecutive" and self.parts == "sub_blocks":
            raise ValueError("a run is of one kind of part: 'consecutive' does not go with 'sub_blocks'")
        return self


class WidthsConfig(Amount):
    """Narrow layers: remove FFN channels, and attention heads by whole KV groups."""

    stage: Literal["widths"] = "widths"
    amounts = ("rate", "rates")
    of: tuple[Literal["ffn", "heads"], ...] = Field(("ffn",), min_length=1, description="What is narrowed.")
    rate: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the parameters of what is narrowed to remove; without it, what the target still needs.",
    )
    rates: dict[Literal["ffn", "heads"], tuple[Annotated[float, Field(ge=0, le=1)], ...]] | None = Field(
        None,
        description="The share to remove for each layer of each kind, in place of an allocation; 1 removes the "
        "sub-block, and the layer if nothing else is in it.",
    )
    allocation: Annotated[str, *known("allocation", ALLOCATIONS)] = Field(
        "uniform",
        description="How the rate is spread over the layers and kinds: alike, rising, by one threshold of "
        "worth, or by what narrowing each costs the whole model ('kl').",
    )
    sequences: int = Field(4, gt=0, description="For 'kl': sequences on which each layer's narrowing is measured.")
    slope: float = Field(0.0, description="For 'ramp': by how much a layer's rate exceeds that of the one before.")
    score: Annotated[str, *known("score", SCORES)] = Field("obs", description="What a channel or head is worth.")
    restore: bool = Field(True, description="Refit the output projection to the dense output (least squares).")
    bias: Literal["existing", "add", "none"] = Field(
        "existing",
        description="Make up for the mean of what goes by the output projection's bias (FLAP): where there is one; "
        "everywhere, by switching on the family's biases where its config allows; or not at all.",
    )
    multiple_of: int = Field(64, gt=0, description="The number of FFN channels left is a multiple of this.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.of)) < len(self.of):
            raise ValueError("'of' names a kind twice")
        if self.rates is not None and set(self.rates) != set(self.of):
            raise ValueError(f"'rates' are for {sorted(self.rates)}, and 'of' is {sorted(self.of)}")
        return self


class RestoreConfig(Amount):
    """Refit every projection in turn, so that the cut model's hidden states follow the dense model's."""

    stage: Literal["restore"] = "restore"
    damping: float | None = Field(
        None,
        gt=0,
        description="Pull towards the weights as they are, as a share of each input's square; without it, for each "
        "refit what serves calibration text best that the refit did not hear.",
    )
    inputs: bool = Field(
        True,
        description="Refit the projections at the beginning of each sub-block too, to receive what the dense ones do.",
    )


class Recovery(Frozen):
    """How a cut model is trained.

    Args:
        method: ``lora`` trains adapters that are merged afterwards (Hu et al., 2021), ``full`` all weights, ``distill``
            all weights after a teacher (Hinton et al., 2015).
        kl_weight: the share of the KL to the teacher in the loss; the rest is the cross-entropy. By default 1 for
            distill, 0.5 for others with a teacher, 0 without.
        hidden_weight: what is added to the loss of how far the states behind each layer are from the teacher's, as a
            share of their square (Jiao et al., TinyBERT, 2020; Muralidharan et al., Minitron, 2024).
        epochs: how often every example is seen.
        max_steps: optimiser steps at most.
        learning_rate: at its peak; it rises over ``warmup`` of the steps and falls along a cosine.
        warmup: a fraction of the steps.
        batch: sequences at once.
        accumulate: batches to a step.
        max_length: tokens of a sequence at most.
        packing: several examples in a sequence, which do not see each other.
        chat: examples are conversations in the model's chat template.
        rank, alpha: of the adapters.
        weight_decay: of AdamW.
        dtype: what is computed in, ``auto`` for what the device multiplies fastest; weights and the optimiser's state
            are float32.
        gradient_checkpointing: compute activations twice and keep few of them.
        evaluations: how often the loss on dev is measured, and the state kept.
        patience: of these without progress, after which training stops.
        seed: of the order of examples and of the adapters.
    """

    method: Literal["lora", "full", "distill"] = "lora"
    kl_weight: float | None = Field(None, ge=0, le=1)
    hidden_weight: float = Field(0.0, ge=0)
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, gt=0)
    learning_rate: float = Field(2e-4, gt=0)
    warmup: float = Field(0.03, ge=0, lt=1)
    batch: int = Field(4, gt=0)
    accumulate: int = Field(1, gt=0)
    max_length: int = Field(1024, gt=1)
    packing: bool = False
    chat: bool = False
    rank: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    evaluations: int = Field(10, gt=0)
    patience: int = Field(3, gt=0)
    seed: int = 0

    def share_of_kl(self, *, teacher: bool) -> float:
        """The share of the KL in the loss, with a teacher or without."""
        if self.kl_weight is not None:
            return self.kl_weight
        return 0.0 if not teacher else 1.0 if self.method == "distill" else 0.5


class RecoverConfig(Amount):
    """Train what is there by now on the calibration text, so that the next cut begins with a better model."""

    stage: Literal["recover"] = "recover"
    method: Literal["lora", "full", "distill"] = Field(
        "lora", description="Train adapters that are merged, all weights, or all weights after the dense model alone."
    )
    kl_weight: float | None = Field(
        None, ge=0, le=1, description="The dense model's share of the loss: by default 1 for distill, else 0.5."
    )
    hidden_weight: float = Field(
        0.0, ge=0, description="What is added of how far hidden states are from the dense model's, as a share."
    )
    sequences: int = Field(512, gt=9, description="Pieces drawn from the text; one in ten of them is watched.")
    max_length: int = Field(512, gt=1, description="Tokens of each at most.")
    epochs: float = Field(1.0, gt=0, description="How often each is seen.")
    learning_rate: float = Field(2e-4, gt=0, description="At the peak of a cosine.")
    batch: int = Field(4, gt=0, description="Sequences at once.")
    rank: int = Field(16, gt=0, description="Rank of the adapters.")

    def options(self, seed: int, dtype: str) -> Recovery:
        """How ``flabc recover`` would be told the same."""
        said = self.model_dump(exclude={"stage", "sequences"})
        return Recovery.model_validate(said | {"alpha": 2 * self.rank, "seed": seed, "dtype": dtype})


StageConfig = Annotated[
    VocabConfig | LayersConfig | WidthsConfig | RestoreConfig | RecoverConfig, Field(discriminator="stage")
]

#: The stages by name, for messages.
STAGE_NAMES = tuple(config.model_fields["stage"].default for config in get_args(get_args(StageConfig)[0]))


def check_stage_name(entry: Any) -> None:
    """Answer an unknown stage with the nearest known one, before pydantic sees the entry.

    Raises:
        UnknownNameError: if ``entry["stage"]`` is a name of no stage.
    """
    name = entry.get("stage") if isinstance(entry, dict) else None
    if isinstance(name, str) and name not in STAGE_NAMES:
        raise UnknownNameError("stage", name, STAGE_NAMES)
