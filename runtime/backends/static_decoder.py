"""Decoding in torch as fast as torch allows: a KV cache of fixed length, fused attention, CUDA graphs. Imports torch.

One decoding step of a layer is some fifteen kernels, which Python starts more slowly than a GPU runs them; so a step is
captured once as a CUDA graph (PyTorch, CUDA semantics, "CUDA Graphs"; the cache of fixed length and the token that
stays on the device are those of gpt-fast) and replayed. On a processor the same code runs step by step.
Shapes are each layer's own: heads, widths, and sub-blocks that are gone.

Letters in shape comments: B sequences, S new tokens, M places in the cache, R places that are looked at, D hidden_size,
H heads, K key-value heads, G = H / K, d head_dim, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flabc.errors import EngineError, UnknownNameError
from flabc.spec import ModelSpec

from .decoder_parts import ATTENTIONS, EAGER, Rotary, cached_attention, compiled_parts, fused_attention
from .decoder_weights import DecoderWeights, LayerWeights

#: Steps look at so many places of the cache, or a multiple: a graph for each, and little is read in vain.
REACH = 256

#: What the length of the cache is a multiple of.
ALIGNED = 64

#: Runs before a capture, in which libraries make what may not be made during one.
BEFORE_CAPTURE = 3

#: Replays of each way of attending before one is chosen.
TRIALS = 5


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
    attention: str


@dataclass(eq=False)
class StaticDecoder:
    """A decoder with a KV cache of fixed length for a fixed number of rows.

    Args:
        spec: the shapes.
        weights: its weights; their device and dtype are what is computed on and in.
        rows: sequences that there is room for.
        places: M, tokens of one sequence that there is room for, at least: kernels want a multiple of ``ALIGNED``.
        graphs: whether steps of one token are captured as CUDA graphs.
        graph_prompts: whether whole prompts are too; each shape of prompt is a graph, so only where they are few.
        fused: whether what is computed number by number is compiled into few kernels (``torch.compile``).
        attention: a name of ``ATTENTIONS`` for steps over the cache; None tries all for each graph and keeps the
            fastest, and is the first where there are no graphs.
        rotary: its positions; by default plain ones of ``spec.rope_theta``.

    Raises:
        UnknownNameError: if the attention has no such name.
        EngineError: if graphs are asked for where there is no CUDA, or positions are scaled and ``rotary`` is missing.
    """

    spec: ModelSpec
    weights: DecoderWeights
    rows: int
    places: int
    graphs: bool
    graph_prompts: bool = False
    fused: bool = False
    attention: str | None = None
    rotary: Rotary | None = None
    _inputs: dict[tuple[int, int], Inputs] = field(default_factory=dict)
    _captured: dict[tuple[int, int, int], Captured] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device, self.dtype = self.weights.head.device, self.weights.head.dtype
        if self.graphs and self.device.type != "cuda":
            raise EngineError("CUDA graphs were asked for.", found=f"weights on the device {self.device}")
        if self.attention not in (None, *ATTENTIONS):
            raise UnknownNameError("attention", str(self.attention), ATTENTIONS)
        if self.rotary is None and self.spec.rope_type != "default":
            raise EngineError(f"Positions of the type {self.spec.rope_type} need their frequencies.")
        self.places = -(-self.places // ALIGNED) * ALIGNED
        rotary = self.rotary or Rotary.plain(self.spec)
        self._cos, self._sin = rotary.tables(self.places, self.dtype, self.device)
        self._places = torch.arange(self.places, device=self.device)
        self.keys, self.values = ([self._cache(layer) for layer in self.weights.layers] for _ in range(2))
        self._parts = compiled_parts() if self.fused else EAGER
        self._pool: Any = torch.cuda.graph_pool_handle() if self.graphs else None

    def _cache(self, layer: LayerWeights) -> Tensor:
        shape = (self.rows, layer.shape.num_key_value_heads, self.places, self.spec.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)  # (B, K, M, d); K may be 0

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
            return self._step(Inputs(ids, positions, last), first, reach, self.attention or next(iter(ATTENTIONS)))
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
        if not self.graphs:
            return self._stepped(shape, inputs, self.attention or next(iter(ATTENTIONS)))
        if shape not in self._captured:
            self._captured[shape] = self._fastest(shape, inputs)
        self._captured[shape].graph.replay()
        return self._captured[shape].logits

    def _stepped(self, shape: tuple[int, int, int], inputs: Inputs, attention: str) -> Tensor:
        logits = self._step(inputs, 0, shape[-1], attention)
        if shape[1] == 1:
            inputs.ids.copy_(logits.argmax(-1, keepdim=True))
            inputs.positions.add_(1)
        return logits

    def _fastest(self, shape: tuple[int, int, int], inputs: Inputs) -> Captured:
        """The step as a graph, in the way of attending to the cache that is the fastest here."""
        names = list(ATTENTIONS) if self.attention is None and shape[-1] else [self.attention or next(iter(ATTENTIONS))]
        found = [self._capture(shape, inputs, name) for name in names]
        if len(found) == 1:
            return found[0]
        times = [min(self._replayed_ms(each, inputs) for _ in range(TRIALS)) for each in found]
        return found[times.index(min(times))]

    def _replayed_ms(self, captured: Captured, inputs: Inputs) -> float:
        """How long a graph takes; the inputs are then what they were, so nothing is written behind the cache's end."""
        kept = inputs.ids.clone(), inputs.positions.clone()
        make: Any = torch.cuda.Event
        before, after = (make(enable_timing=True) for _ in range(2))
        before.record()
        captured.graph.replay()
        after.record()
        inputs.ids.copy_(kept[0]), inputs.positions.copy_(kept[1])
        after.synchronize()
        return float(before.elapsed_time(after))

    def _capture(self, shape: tuple[int, int, int], inputs: Inputs, attention: str) -> Captured:
        """Record a step; nothing of it is done yet. The rehearsals write to the cache what the step will write."""
        cuda: Any = torch.cuda
        stream = cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(BEFORE_CAPTURE):
                self._step(inputs, 0, shape[-1], attention)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._stepped(shape, inputs, attention)
        return Captured(graph, logits, attention)

    @property
    def attentions(self) -> dict[str, str]:
        """Which way of attending each graph of single tokens took, by rows and reach."""
        return {f"{key[0]}x{key[2]}": each.attention for key, each in self._captured.items() if key[2]}

    def _step(self, inputs: Inputs, first: int, reach: int, attention: str) -> Tensor:
        rows = slice(first, first + len(inputs.ids))
        hidden = self._hidden(inputs.ids, inputs.positions, rows, reach, attention)
        at = inputs.last[:, None, None].expand(-1, 1, hidden.shape[-1])
        return self._logits(hidden.gather(1, at)[:, 0])  # (B, V)

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(self._normed(hidden, self.weights.final_norm), self.weights.head)

    def _hidden(self, ids: Tensor, positions: Tensor, rows: slice | None, reach: int, attention: str = "") -> Tensor:
        """The residual stream behind the last layer, (B, S, D)."""
        x = F.embedding(ids, self.weights.embedding)
        flat = positions.reshape(-1)
        turn = self._cos[flat][:, None], self._sin[flat][:, None]  # (B S, 1, d)
        mask = self._places[:reach] <= positions[:, None, :, None] if reach else None  # (B, 1, S, R)
        attend = ATTENTIONS.get(attention, fused_attention)
        for index, layer in enumerate(self.weights.layers):
            if layer.shape.has_attention:
                q, k, v = self._projected(layer, self._normed(x, layer.attention_norm), turn)
                if rows is not None:
                    self._write(index, rows, positions, k, v)
                if mask is None or rows is None:  # fresh: they attend to each other only
                    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
                else:
                    keys, values = (cache[index][rows, :, :reach] for cache in (self.keys, self.values))
                    mixed = cached_attention(attend, q, keys, values, mask)
                _add_product(x, mixed.transpose(1, 2).flatten(2), layer.o, layer.o_bias)
            if layer.shape.has_ffn:
                wide = F.linear(self._normed(x, layer.ffn_norm), _there(layer.gate_up), layer.gate_up_bias)
                _add_product(x, self._parts.gated(wide.view(-1, wide.shape[-1])), layer.down, layer.down_bias)
        return x

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        width = x.shape[-1]
        return self._parts.normed(x.reshape(-1, width), _there(weight), self.spec.rms_norm_eps).view(x.shape)

    def _projected(self, layer: LayerWeights, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, S, d), key and value (B, K, S, d)."""
        heads, groups = layer.shape.num_attention_heads, layer.shape.num_key_value_heads
        qkv = F.linear(x, _there(layer.qkv), layer.qkv_bias).view(-1, heads + 2 * groups, self.spec.head_dim)
        qk, v = qkv[:, : heads + groups], qkv[:, heads + groups :]
        if layer.q_norm is not None:
            qk = torch.cat(
                [self._normed(qk[:, :heads], layer.q_norm), self._normed(qk[:, heads:], _there(layer.k_norm))], 1
            )
        qk = self._parts.turned(qk, *turn)
        q, k = qk[:, :heads], qk[:, heads:]
        q, k, v = (part.reshape(*x.shape[:2], -1, self.spec.head_dim).transpose(1, 2) for part in (q, k, v))
        return q, k, v

    def _write(self, index: int, rows: slice, positions: Tensor, k: Tensor, v: Tensor) -> None:
        at = positions[:, None, :, None].expand_as(k)
        self.keys[index][rows].scatter_(2, at, k)
        self.values[index][rows].scatter_(2, at, v)


def _add_product(x: Tensor, inner: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Add a product to the residual stream where it lies: the sum costs no kernel of its own."""
    x.view(-1, x.shape[-1]).addmm_(inner.reshape(-1, inner.shape[-1]), _there(weight).t())
    if bias is not None:
        x.add_(bias)


def _there(weight: Tensor | None) -> Tensor:
    assert weight is not None
    return weight
