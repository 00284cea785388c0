"""What the static decoder computes beside its products: positions, attention, norms, gates. Imports torch.

Letters in shape comments: B sequences, S new tokens, M places in the cache, R places that are looked at, Q queries,
H heads, K key-value heads, G = H / K, d head_dim, F intermediate_size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flabc.spec import ModelSpec


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: each pair of numbers' turn per place, (d / 2,), and what cosine and sine are scaled by."""

    frequencies: Tensor
    scaling: float = 1.0

    @classmethod
    def plain(cls, spec: ModelSpec) -> Rotary:
        """Positions that are not scaled (Su et al., RoFormer, 2021)."""
        powers = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
        return cls(1.0 / spec.rope_theta**powers)

    def tables(self, places: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every place, (M, d) each; the sine's first half has the sign of the turn."""
        turns = torch.outer(torch.arange(places, dtype=torch.float32), self.frequencies.float().cpu())
        cos, sin = turns.cos() * self.scaling, turns.sin() * self.scaling
        return torch.cat([cos, cos], -1).to(device, dtype), torch.cat([-sin, sin], -1).to(device, dtype)


#: Attends with (B, K, Q, d) to (B, K, R, d) under a mask (B, 1, Q, R).
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def cached_attention(attend: Attend, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of (B, H, S, d) to (B, K, R, d) by a mask (B, 1, S, R); (B, H, S, d).

    The G heads of a group take the place of G queries of one head: the kernels that take a mask know no groups, and
    would be given every key G times.
    """
    rows, heads, new, width = q.shape
    groups = keys.shape[1]
    folded = q.reshape(rows, groups, heads // groups * new, width)
    seen = mask.repeat(1, 1, heads // groups, 1) if new > 1 else mask
    mixed: Tensor = attend(folded, keys, values, seen).reshape(rows, heads, new, width)
    return mixed


def fused_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Torch's own kernel: one for all, a block of threads for each row and KV head."""
    if mask.shape[2] == 1:
        mask = mask.expand(-1, -1, q.shape[2], -1)
    mixed: Tensor = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return mixed


def product_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Two products and a softmax: more kernels, but a few long rows of few KV heads keep the whole device busy."""
    scores = (q * q.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    shares = scores.float().masked_fill(~mask, float("-inf")).softmax(-1)
    mixed: Tensor = shares.to(values.dtype) @ values
    return mixed


#: Ways of attending to the cache; the first is taken where nothing is tried.
ATTENTIONS: dict[str, Attend] = {"fused": fused_attention, "products": product_attention}


@dataclass(frozen=True)
class Parts:
    """What a layer computes number by number, on rows: one axis less is one less to compile for."""

    normed: Callable[[Tensor, Tensor, float], Tensor]
    turned: Callable[[Tensor, Tensor, Tensor], Tensor]
    gated: Callable[[Tensor], Tensor]


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, the two halves of each head as pairs; (rows, heads, d), by tables (rows, 1, d)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _gated(wide: Tensor) -> Tensor:
    """SiLU of the first half times the second; (rows, 2F) in, (rows, F) out."""
    gate, up = wide.chunk(2, -1)
    return F.silu(gate) * up


EAGER = Parts(_normed, _turned, _gated)


@cache
def compiled_parts() -> Parts:
    """The same, each compiled when it is first called; shapes are left open, as layers differ.

    One row and many, each dtype and each epsilon are still compiled for apart: more often than torch allows by default.
    """
    settings: Any = importlib.import_module("torch._dynamo.config")
    settings.recompile_limit = max(settings.recompile_limit, 64)
    return Parts(*(torch.compile(part, dynamic=True, fullgraph=True) for part in vars(EAGER).values()))


def fault_of_fusing(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device here; None if it can."""
    try:
        compiled_parts().gated(torch.ones(2, 2, 8, device=device))
    except Exception as error:  # compilers fail in their own ways: no Triton, no C compiler, a folder that is not ours
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return None
