"""Decoding in torch as fast as torch allows: a KV cache of fixed length, fused attention, CUDA graphs. Imports torch.

One decoding step of a layer is some fifteen kernels, which Python starts more slowly than a GPU runs them; so a step is
captured once as a CUDA graph (PyTorch, CUDA semantics, "CUDA Graphs"; the cache of fixed length and the token that
stays on the device are those of gpt-fast) and replayed. On a processor the same code runs step by step.
Shapes are each layer's own: heads, widths, and sub-blocks that are gone.

Letters in shape comments: B sequences, S new tokens, M places in the cache, R places that are looked at, D hidden_size,
H heads, K key-value heads, G = H / K, d head_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flabc.errors import EngineError
from flabc.spec import ModelSpec

from .decoder_weights import DecoderWeights, LayerWeights, bytes_read

#: Steps look at so many places of the cache, or a multiple: a graph for each, and little is read in vain.
REACH = 256

#: Runs before a capture, in which libraries make what may not be made during one.
BEFORE_CAPTURE = 3


@dataclass(eq=False)
class Inputs:
    """What a captured step reads, where it stands; it leaves the next token and position there."""

    ids: Tensor  # (B, S)
    positions: Tensor  # (B, S)
    last: Tensor  # (B,): the place in S of each row's last real token


@dataclass(eq=False)
class Captured:
    """A CUDA graph and where its logits are."""

    graph: Any
    logits: Tensor


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
        """Cosine and sine of every place, (M, d) each."""
        turns = torch.outer(torch.arange(places, dtype=torch.float32), self.frequencies.float().cpu())
        both = torch.cat([turns, turns], -1)
        cos, sin = both.cos() * self.scaling, both.sin() * self.scaling
        return cos.to(device, dtype), sin.to(device, dtype)


@dataclass(eq=False)
class StaticDecoder:
    """A decoder with a KV cache of fixed length for a fixed number of rows.

    Args:
        spec: the shapes.
        weights: its weights; their device and dtype are what is computed on and in.
        rows: sequences that there is room for.
        places: M, tokens of one sequence that there is room for.
        graphs: whether steps of one token are captured as CUDA graphs.
        graph_prompts: whether whole prompts are too; each shape of prompt is a graph, so only where they are few.
        rotary: its positions; by default plain ones of ``spec.rope_theta``.

    Raises:
        EngineError: if graphs are asked for where there is no CUDA, or positions are scaled and ``rotary`` is missing.
    """

    spec: ModelSpec
    weights: DecoderWeights
    rows: int
    places: int
    graphs: bool
    graph_prompts: bool = False
    rotary: Rotary | None = None
    _inputs: dict[tuple[int, int], Inputs] = field(default_factory=dict)
    _captured: dict[tuple[int, int, int], Captured] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device, self.dtype = self.weights.head.device, self.weights.head.dtype
        if self.graphs and self.device.type != "cuda":
            raise EngineError("CUDA graphs were asked for.", found=f"weights on the device {self.device}")
        if self.rotary is None and self.spec.rope_type != "default":
            raise EngineError(f"Positions of the type {self.spec.rope_type} need their frequencies.")
        rotary = self.rotary or Rotary.plain(self.spec)
        self._cos, self._sin = rotary.tables(self.places, self.dtype, self.device)
        self._places = torch.arange(self.places, device=self.device)
        self.keys, self.values = ([self._cache(layer) for layer in self.weights.layers] for _ in range(2))
        self._pool: Any = torch.cuda.graph_pool_handle() if self.graphs else None

    def _cache(self, layer: LayerWeights) -> Tensor:
        shape = (self.rows, layer.shape.num_key_value_heads, self.places, self.spec.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)  # (B, K, M, d); K may be 0

    @property
    def cache_bytes(self) -> int:
        """Bytes of the whole KV cache."""
        return sum(part.numel() * part.element_size() for part in (*self.keys, *self.values))

    def bytes_per_step(self, rows: int, length: int) -> int:
        """Bytes that a step of rows which hold ``length`` tokens each reads: weights once, and keys and values."""
        values = sum(2 * layer.shape.num_key_value_heads for layer in self.weights.layers) * self.spec.head_dim
        return bytes_read(self.weights) + rows * length * values * self.weights.head.element_size()

    @torch.inference_mode()
    def prompt(self, ids: Tensor, last: Tensor, first: int = 0) -> Tensor:
        """Fill fresh rows from ``first`` on.

        Args:
            ids: (B, S); what stands behind a row's last real token is padding.
            last: (B,), the place of each row's last real token.
            first: the row of the cache that is row 0.

        Returns:
            logits after each row's last real token, (B, V), valid until the next call.
        """
        positions = self._places[: ids.shape[1]].expand(len(ids), -1)
        return self._run(ids, positions, last, first, 0)

    @torch.inference_mode()
    def extend(self, ids: Tensor, positions: Tensor, last: Tensor, longest: int, first: int = 0) -> Tensor:
        """Write tokens behind what rows hold.

        Args:
            ids: (B, S).
            positions: (B, S), where each goes.
            last: (B,), the place in S of each row's last real token.
            longest: tokens that the longest row holds afterwards.
            first: the row of the cache that is row 0.

        Returns:
            logits after each row's last real token, (B, V), valid until the next call.
        """
        return self._run(ids, positions, last, first, self._reach(longest))

    @torch.inference_mode()
    def next(self, rows: int, longest: int) -> Tensor:
        """Write the token that ``begin`` gave or the last ``next`` found, and find the likeliest after it.

        Args:
            rows: B, of ``begin``.
            longest: tokens that the longest row holds afterwards.

        Returns:
            the tokens, (B, 1), where the next call overwrites them.
        """
        inputs = self._inputs[rows, 1]
        self._replay((rows, 1, self._reach(longest)), inputs)
        return inputs.ids

    @torch.inference_mode()
    def begin(self, ids: Tensor, positions: Tensor) -> None:
        """Say which tokens ``next`` goes on with, (B, 1), and where they stand, (B, 1)."""
        self._put(ids, positions, torch.zeros(len(ids), dtype=torch.int64, device=self.device))

    @torch.inference_mode()
    def score(self, ids: Tensor) -> Tensor:
        """Logits at every position of fresh sequences, (B, S, V); leaves the cache alone."""
        positions = self._places[: ids.shape[1]].expand(len(ids), -1)
        return self._logits(self._hidden(ids, positions, None, 0))

    def _reach(self, longest: int) -> int:
        return min(-(-longest // REACH) * REACH, self.places)

    def _run(self, ids: Tensor, positions: Tensor, last: Tensor, first: int, reach: int) -> Tensor:
        captured = ids.shape[1] == 1 or (self.graph_prompts and not reach)
        if not (self.graphs and captured) or first:
            return self._step(Inputs(ids, positions, last), first, reach)
        return self._replay((len(ids), ids.shape[1], reach), self._put(ids, positions, last))

    def _put(self, ids: Tensor, positions: Tensor, last: Tensor) -> Inputs:
        """Copy what a step reads to where its graph looks for it."""
        rows, new = ids.shape
        if (rows, new) not in self._inputs:
            self._inputs[rows, new] = Inputs(ids.clone(), positions.clone(), last.clone())
        inputs = self._inputs[rows, new]
        inputs.ids.copy_(ids), inputs.positions.copy_(positions), inputs.last.copy_(last)
        return inputs

    def _replay(self, shape: tuple[int, int, int], inputs: Inputs) -> Tensor:
        """Run a step on its inputs; of one token, leave the next one and its place there."""

        def step() -> Tensor:
            logits = self._step(inputs, 0, shape[-1])
            if shape[1] == 1:
                inputs.ids.copy_(logits.argmax(-1, keepdim=True))
                inputs.positions.add_(1)
            return logits

        if not self.graphs:
            return step()
        if shape not in self._captured:
            self._captured[shape] = self._capture(lambda: self._step(inputs, 0, shape[-1]), step)
        self._captured[shape].graph.replay()
        return self._captured[shape].logits

    def _capture(self, rehearsal: Callable[[], Tensor], step: Callable[[], Tensor]) -> Captured:
        """Record a step; nothing of it is done yet. The rehearsal writes to the cache what the step will write."""
        cuda: Any = torch.cuda
        stream = cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(BEFORE_CAPTURE):
                rehearsal()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = step()
        return Captured(graph, logits)

    def _step(self, inputs: Inputs, first: int, reach: int) -> Tensor:
        hidden = self._hidden(inputs.ids, inputs.positions, slice(first, first + len(inputs.ids)), reach)
        at = inputs.last[:, None, None].expand(-1, 1, hidden.shape[-1])
        return self._logits(hidden.gather(1, at)[:, 0])  # (B, V)

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(self._normed(hidden, self.weights.final_norm), self.weights.head)

    def _hidden(self, ids: Tensor, positions: Tensor, rows: slice | None, reach: int) -> Tensor:
        """The residual stream behind the last layer, (B, S, D)."""
        x = F.embedding(ids, self.weights.embedding)
        turn = self._cos[positions][:, None], self._sin[positions][:, None]  # (B, 1, S, d)
        mask = self._places[:reach] <= positions[:, None, :, None] if reach else None  # (B, 1, S, R)
        for index, layer in enumerate(self.weights.layers):
            if layer.shape.has_attention:
                normed = self._normed(x, layer.attention_norm)
                x = x + self._attention(index, layer, normed, positions, turn, mask, rows)
            if layer.shape.has_ffn:
                x = x + _ffn(layer, self._normed(x, layer.ffn_norm))
        return x

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.spec.rms_norm_eps)

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x: Tensor,
        positions: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Tensor | None,
        rows: slice | None,
    ) -> Tensor:
        heads, groups, width = layer.shape.num_attention_heads, layer.shape.num_key_value_heads, self.spec.head_dim
        qkv = F.linear(x, _there(layer.qkv), layer.qkv_bias)
        qkv = qkv.reshape(*x.shape[:-1], heads + 2 * groups, width)
        q, k, v = (part.transpose(1, 2) for part in qkv.split((heads, groups, groups), 2))  # (B, H or K, S, d)
        if layer.q_norm is not None:
            q, k = self._normed(q, layer.q_norm), self._normed(k, layer.k_norm)
        q, k = _turned(q, *turn), _turned(k, *turn)
        if rows is not None:
            at = positions[:, None, :, None].expand_as(k)
            self.keys[index][rows].scatter_(2, at, k)
            self.values[index][rows].scatter_(2, at, v)
        if mask is None:  # fresh: they attend to each other only
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)
        else:
            keys, values = (cache[index][rows, :, : mask.shape[-1]] for cache in (self.keys, self.values))
            mixed = _cached_attention(q, keys, values, mask)
        return F.linear(mixed.transpose(1, 2).flatten(2), _there(layer.o), layer.o_bias)


def _cached_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of (B, H, S, d) to (B, K, R, d) by a mask (B, 1, S, R); (B, H, S, d).

    The G heads of a group take the place of G queries of one head: the kernels that take a mask know no groups, and
    would be given every key G times.
    """
    rows, heads, new, width = q.shape
    groups = keys.shape[1]
    folded = q.reshape(rows, groups, heads // groups * new, width)
    seen = mask.repeat(1, 1, heads // groups, 1) if new > 1 else mask
    mixed = F.scaled_dot_product_attention(folded, keys, values, attn_mask=seen)
    return mixed.reshape(rows, heads, new, width)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, the two halves of each head as pairs."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def _ffn(layer: LayerWeights, x: Tensor) -> Tensor:
    gate, up = F.linear(x, _there(layer.gate_up), layer.gate_up_bias).chunk(2, -1)
    return F.linear(F.silu(gate) * up, _there(layer.down), layer.down_bias)


def _there(weight: Tensor | None) -> Tensor:
    assert weight is not None
    return weight
