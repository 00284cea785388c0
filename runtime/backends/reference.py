"""Torch and transformers: checkpoints, as the dense reference. The only module of the runtime that imports torch.

It computes in float32 whatever the weights are stored in, as engines do: half precision rounds by more than the
differences that the reference is there to show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flabc.errors import EngineError, require
from flabc.runtime.backend import Ids, Limits, Logits
from flabc.spec import ModelSpec


def open_backend(folder: Path, spec: ModelSpec, limits: Limits) -> TorchBackend:
    """Open a Hugging Face folder.

    Raises:
        MissingExtraError: if torch or transformers is not installed.
        EngineError: if CUDA is asked for and not there.
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
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=self._torch.float32, local_files_only=True
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
        steps = np.arange(ids.shape[1])
        self._valid = np.concatenate([self._valid, (steps < counts[:, None]).astype(np.int64)], axis=1)
        positions = lengths[:, None] + np.minimum(steps, counts[:, None] - 1)
        with self._torch.no_grad():
            hidden = self._model.model(
                input_ids=self._tensor(ids),
                attention_mask=self._tensor(self._valid),
                position_ids=self._tensor(positions),
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state  # (B, S, D)
            last = hidden[self._torch.arange(len(ids)), self._tensor(counts - 1)]
            return self._numpy(self._model.lm_head(last))

    def score(self, ids: Ids) -> Logits:
        """Logits at every position of fresh sequences, (B, S, V)."""
        with self._torch.no_grad():
            return self._numpy(self._model(input_ids=self._tensor(ids), use_cache=False).logits)

    def _tensor(self, array: Ids) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(array)).to(self._model.device)

    def _numpy(self, logits: Any) -> Logits:
        array: Logits = logits.float().cpu().numpy()
        return array
