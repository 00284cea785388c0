"""Torch and transformers: checkpoints, as the dense reference. The only module of the runtime that imports torch.

Unless bfloat16 is asked for it computes in float32 whatever the weights are stored in, as engines do: half precision
rounds by more than the differences that the reference is there to show.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flabc.errors import EngineError, UnknownNameError, require
from flabc.families import family_named
from flabc.families.per_layer import MODELING, modeling_code
from flabc.runtime.backend import Ids, Limits, Logits
from flabc.spec import ModelSpec

#: What it can compute in, as torch calls it.
DTYPES = ("float32", "bfloat16")


def open_backend(folder: Path, spec: ModelSpec, limits: Limits) -> TorchBackend:
    """Open a Hugging Face folder.

    Raises:
        MissingExtraError: if torch or transformers is not installed.
        EngineError: if CUDA is asked for and not there.
        UnknownNameError: if the dtype is neither ``float32`` nor ``bfloat16``.
    """
    return TorchBackend(folder, spec, limits)


class TorchBackend:
    """A checkpoint in transformers. See ``Backend`` for the contract."""

    name = "torch"

    def __init__(self, folder: Path, spec: ModelSpec, limits: Limits) -> None:
        self.spec = spec
        self.limits = limits
        self._torch: Any = require("torch", "compress")
        transformers: Any = require("transformers", "compress")
        if limits.threads is not None:
            self._torch.set_num_threads(limits.threads)
        device = "cpu" if limits.provider == "auto" else limits.provider
        if device == "cuda" and not self._torch.cuda.is_available():
            raise EngineError("CUDA was asked for.", found="a torch that sees no CUDA device")
        if limits.dtype not in DTYPES:
            raise UnknownNameError("dtype", limits.dtype, DTYPES)
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(self._torch, limits.dtype),
            local_files_only=True,
            trust_remote_code=has_own_module(folder, spec),
        )
        transformers.logging.set_verbosity(verbosity)
        self._model = model.to(device).eval()
        self._cache_class = transformers.DynamicCache
        self.start(1)

    def start(self, batch: int) -> None:
        """Forget all sequences and begin ``batch`` new ones."""
        self.limits.check_batch(batch)
        self._cache = self._cache_class(config=self._model.config)
        self._valid = np.zeros((batch, 0), np.int64)  # (B, total): which cached positions are real

    def extend(self, ids: Ids, counts: Ids) -> Logits:
        """Append tokens to every sequence; (B, S) and (B,) in, (B, V) out."""
        lengths = self._valid.sum(1)
        self.limits.check_length(int((lengths + counts).max()))
        self._valid = np.concatenate([self._valid, _real(ids, counts)], axis=1)
        positions = lengths[:, None] + np.minimum(np.arange(ids.shape[1]), counts[:, None] - 1)
        return self._run(ids, counts, positions, self._valid, self._cache)

    def join(self, ids: Ids, counts: Ids) -> Logits:
        """Let new sequences join behind those that are running."""
        self.limits.check_batch(len(self._valid) + len(ids))
        self.limits.check_length(int(counts.max()))
        cache, valid = self._cache_class(config=self._model.config), _real(ids, counts)
        positions = np.minimum(np.arange(ids.shape[1]), counts[:, None] - 1)
        logits = self._run(ids, counts, positions, valid, cache)
        if not len(self._valid):
            self._cache, self._valid = cache, valid
            return logits
        # Caches of one length: the shorter gets positions in front that nobody attends to.
        longest = max(self._valid.shape[1], valid.shape[1])
        for ours, theirs in zip(self._cache.layers, cache.layers, strict=True):
            ours.keys = self._stack(ours.keys, theirs.keys, longest)
            ours.values = self._stack(ours.values, theirs.values, longest)
        self._valid = np.concatenate(
            [np.pad(part, ((0, 0), (longest - part.shape[1], 0))) for part in (self._valid, valid)]
        )
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only."""
        self._cache.batch_select_indices(self._tensor(np.array(rows, np.int64)))
        self._valid = self._valid[list(rows)]

    def _run(self, ids: Ids, counts: Ids, positions: Ids, valid: Ids, cache: Any) -> Logits:
        with self._torch.no_grad():
            hidden = self._model.model(
                input_ids=self._tensor(ids),
                attention_mask=self._tensor(valid),
                position_ids=self._tensor(positions),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state  # (B, S, D)
            last = hidden[self._torch.arange(len(ids)), self._tensor(counts - 1)]
            return self._numpy(self._model.lm_head(last))

    def _stack(self, ours: Any, theirs: Any, longest: int) -> Any:
        """Two caches (B, H, T, d) as one of ``longest`` positions."""
        pad = self._torch.nn.functional.pad
        return self._torch.cat([pad(part, (0, 0, longest - part.shape[2], 0)) for part in (ours, theirs)])

    def score(self, ids: Ids) -> Logits:
        """Logits at every position of fresh sequences, (B, S, V)."""
        with self._torch.no_grad():
            return self._numpy(self._model(input_ids=self._tensor(ids), use_cache=False).logits)

    def _tensor(self, array: Ids) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(array)).to(self._model.device)

    def _numpy(self, logits: Any) -> Logits:
        array: Logits = logits.float().cpu().numpy()
        return array


def has_own_module(folder: Path, spec: ModelSpec) -> bool:
    """Whether a model is built by a module in its folder, which is run only if flabc would write the same.

    Raises:
        EngineError: if it is other code.
    """
    file = folder / MODELING
    if not file.is_file():
        return False
    if file.read_text(encoding="utf-8") != modeling_code(family_named(spec.family)):
        raise EngineError(
            f"{file} is not the module that this version of flabc writes, and is not run.",
            fix="Make the checkpoint again, or load it in transformers if you trust it.",
        )
    return True


def _real(ids: Ids, counts: Ids) -> Ids:
    """Which of (B, S) tokens are no padding."""
    real: Ids = (np.arange(ids.shape[1]) < counts[:, None]).astype(np.int64)
    return real
