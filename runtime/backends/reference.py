"""Torch and transformers: checkpoints, as the dense reference. Imported, as all that needs torch, when it is asked for.

Unless bfloat16 is asked for it computes in float32 whatever the weights are stored in, as engines do: half precision
rounds by more than the differences that the reference is there to show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flabc.console import note
from flabc.errors import EngineError, UnknownNameError, require
from flabc.families import family_named
from flabc.families.per_layer import has_own_module
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
        self.spec, self._family = spec, family_named(spec.family)
        self.limits = limits
        self._torch: Any = require("torch", "compress")
        transformers: Any = require("transformers", "compress")
        if limits.threads is not None:
            self._torch.set_num_threads(limits.threads)
        device = device_of(self._torch, limits.provider)
        if limits.dtype not in DTYPES:
            raise UnknownNameError("dtype", limits.dtype, DTYPES)
        if (
            limits.dtype == "bfloat16"
            and device.type == "cpu"
            and not self._torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ):
            note(
                "this processor has no units for bfloat16, which is computed in software: float32 is many times faster"
            )
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(self._torch, limits.dtype),
            local_files_only=True,
            trust_remote_code=has_own_module(folder, self._family),
        )
        transformers.logging.set_verbosity(verbosity)
        self._model = model.to(device).eval()
        self._config, self._windows = model.config.to_dict(), _windows(model.config)
        # A window counts tokens; in a ragged batch a cache that forgets would count padding too.
        forgets = any(self._windows.values())
        self._new_cache: Any = partial(transformers.DynamicCache, **({} if forgets else {"config": model.config}))
        self.start(1)

    def start(self, batch: int) -> None:
        """Forget all sequences and begin ``batch`` new ones."""
        self.limits.check_batch(batch)
        self._cache = self._new_cache()
        self._places = np.zeros((batch, 0), np.int64)  # (B, total): where each cached token stands, -1 for padding

    def extend(self, ids: Ids, counts: Ids, first: int = 0) -> Logits:
        """Append tokens to the sequences from ``first`` on; (B, S) and (B,) in, (B, V) out."""
        rows, running = range(first, first + len(ids)), len(self._places)
        lengths = (self._places[list(rows)] >= 0).sum(1)
        self.limits.check_length(int((lengths + counts).max()))
        parts = [part for part in (range(first), rows, range(rows.stop, running)) if part]
        caches = [self._cache] if len(parts) == 1 else [self._part(part) for part in parts]
        places = [self._places[list(part)] for part in parts]
        at = parts.index(rows)
        places[at] = np.concatenate([places[at], _places(ids, counts, lengths)], axis=1)
        logits = self._run(ids, counts, lengths, places[at], caches[at])
        self._together(caches, places)
        return logits

    def join(self, ids: Ids, counts: Ids) -> Logits:
        """Let new sequences join behind those that are running."""
        self.limits.check_batch(len(self._places) + len(ids))
        self.limits.check_length(int(counts.max()))
        begin = np.zeros_like(counts)
        cache, places = self._new_cache(), _places(ids, counts, begin)
        logits = self._run(ids, counts, begin, places, cache)
        self._append(cache, places)
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only."""
        self._cache.batch_select_indices(self._tensor(np.array(rows, np.int64)))
        self._places = self._places[list(rows)]

    def save(self, row: int, length: int) -> dict[str, Any]:
        """A copy of the keys and values of a sequence's first tokens, (H, length, d) each."""
        real = self._tensor(np.flatnonzero(self._places[row] >= 0)[:length])
        pairs = {"key": "keys", "value": "values"}
        return {
            f"{index}.{kind}": getattr(layer, name)[row][:, real]
            for index, layer in enumerate(self._cache.layers)
            for kind, name in pairs.items()
        }

    def restore(self, saved: Mapping[str, Any], length: int) -> None:
        """Let a sequence join that begins with the first tokens of one that was saved."""
        self.limits.check_batch(len(self._places) + 1)
        cache = self._new_cache()
        for index in range(len(saved) // 2):
            key, value = (saved[f"{index}.{kind}"][None, :, :length] for kind in ("key", "value"))
            cache.update(key, value, index)
        self._append(cache, np.arange(length)[None])

    def _part(self, rows: Sequence[int]) -> Any:
        """The cache of some of the rows."""
        cache = self._new_cache()
        for index, layer in enumerate(self._cache.layers):
            cache.update(layer.keys[rows[0] : rows[-1] + 1], layer.values[rows[0] : rows[-1] + 1], index)
        return cache

    def _append(self, cache: Any, places: Ids) -> None:
        if len(self._places):
            self._together([self._cache, cache], [self._places, places])
        else:
            self._cache, self._places = cache, places

    def _together(self, caches: Sequence[Any], places: Sequence[Ids]) -> None:
        """Go on with the sequences of several caches, one behind the other, in the first cache."""
        # Caches of one length: the shorter get positions in front that nobody attends to.
        longest = max(part.shape[1] for part in places)
        self._cache = caches[0]
        if len(caches) > 1:
            for layers in zip(*(cache.layers for cache in caches), strict=True):
                layers[0].keys = self._stack([layer.keys for layer in layers], longest)
                layers[0].values = self._stack([layer.values for layer in layers], longest)
        self._places = np.concatenate(
            [np.pad(part, ((0, 0), (longest - part.shape[1], 0)), constant_values=-1) for part in places]
        )

    def _run(self, ids: Ids, counts: Ids, begin: Ids, places: Ids, cache: Any) -> Logits:
        """Logits after each row's last token; ``begin`` (B,) is where its first one stands."""
        positions = begin[:, None] + np.minimum(np.arange(ids.shape[1]), counts[:, None] - 1)  # (B, S)
        with self._torch.no_grad():
            hidden = self._model.model(
                input_ids=self._tensor(ids),
                attention_mask=self._mask(positions, places),
                position_ids=self._tensor(positions),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state  # (B, S, D)
            # Logits for the last tokens only: for all of a batch of prompts they would take gigabytes.
            logits = self._model.lm_head(hidden[self._torch.arange(len(ids)), self._tensor(counts - 1)])
            return self._numpy(self._family.finished(logits, self._config))

    def _mask(self, positions: Ids, places: Ids) -> Any:
        """What transformers makes its masks of: which cached tokens are real; or, where windows count, the masks."""
        if not any(self._windows.values()):
            return self._tensor((places >= 0).astype(np.int64))
        masks = {kind: self._allowed(positions, places, window) for kind, window in self._windows.items()}
        return masks if self._family.typed_masks else next(iter(masks.values()))

    def _allowed(self, positions: Ids, places: Ids, window: int | None) -> Any:
        """(B, 1, S, total): 0 where a token at (B, S) attends to one that stands at (B, total)."""
        ahead = positions[:, :, None] - places[:, None, :]
        seen = (places[:, None, :] >= 0) & (ahead >= 0) & (ahead < (window or np.inf))
        lowest = self._torch.finfo(self._model.dtype).min
        return self._tensor(np.where(seen, 0, lowest)[:, None]).to(self._model.dtype)

    def _stack(self, parts: Sequence[Any], longest: int) -> Any:
        """Caches (B, H, T, d) as one of ``longest`` positions."""
        pad = self._torch.nn.functional.pad
        return self._torch.cat([pad(part, (0, 0, longest - part.shape[2], 0)) for part in parts])

    def score(self, ids: Ids) -> Logits:
        """Logits at every position of fresh sequences, (B, S, V)."""
        with self._torch.no_grad():
            return self._numpy(self._model(input_ids=self._tensor(ids), use_cache=False).logits)

    def change_matrices(self, change: Callable[[Logits], Logits]) -> None:
        """Put a function of it in the place of every weight matrix, one after another: to see what rounding costs."""
        with self._torch.no_grad():
            for parameter in self._model.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(self._torch.from_numpy(change(parameter.float().cpu().numpy())))

    def _tensor(self, array: Ids) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(array)).to(self._model.device)

    def _numpy(self, logits: Any) -> Logits:
        array: Logits = logits.float().cpu().numpy()
        return array


def device_of(torch: Any, provider: str) -> Any:
    """The device of a provider: ``auto`` is the processor.

    Raises:
        UnknownNameError: if it is neither ``auto``, ``cpu`` nor ``cuda``.
        EngineError: if it is ``cuda``, and torch sees none.
    """
    if provider not in ("auto", "cpu", "cuda"):
        raise UnknownNameError("provider", provider, ("auto", "cpu", "cuda"))
    if provider == "cuda" and not torch.cuda.is_available():
        raise EngineError("CUDA was asked for.", found="a torch that sees no CUDA device")
    return torch.device("cuda", 0) if provider == "cuda" else torch.device("cpu")


def _windows(config: Any) -> dict[str, int | None]:
    """How far back each type of layer looks, None for all the way; one type if the model does not tell them apart."""
    window = getattr(config, "sliding_window", None)
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or ["sliding_attention"])
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def _places(ids: Ids, counts: Ids, begin: Ids) -> Ids:
    """Where each of (B, S) tokens stands, from ``begin`` (B,) on; -1 for padding."""
    steps = np.arange(ids.shape[1])
    places: Ids = np.where(steps < counts[:, None], begin[:, None] + steps, -1)
    return places
