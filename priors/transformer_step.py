"""One position at a time through an x-transformers decoder, with keys and values in preallocated caches.

The library's own cache copies all keys and values at every step, to append one, and rotates all keys anew:
most of the time on a long map. Here they are written in place, rotated once. The weights are packed once for the
whole map: queries, keys and values in one matrix, normalisation gains and the attention's scale multiplied into
the matrix behind them, all transposed to (in, out).

It computes what `TransformerWrapper` computes, for exactly the architecture `priors.transformer` builds:
causal self-attention and SwiGLU in pre-norm blocks, bias-free LayerNorm, interleaved rotary positions over the
whole head. Before it is used, the network is compared with that by names and shapes and on a few positions;
where a version of the library differs, the library's own cache serves instead, with a warning. Tests hold all
three equal: this step, the library's cache, the full pass.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-5
"""Of the library's LayerNorm."""
PROBED = 3
"""Positions on which the packed step is compared with the network before it is trusted."""
TOLERANCE = 1e-2
"""Of that comparison: above rounding, be it that of TF32, and below what another architecture makes of it."""


class _Block(NamedTuple):
    """Packed weights of one block; ``hidden`` is the width of the feedforward."""

    qkv: Tensor  # (dim, (H + 2 G) * head width); the queries of one group of heads lie side by side
    out: Tensor  # (dim, dim)
    up: Tensor  # (dim, 2 * hidden), values, then gates
    up_bias: Tensor  # (2 * hidden,)
    down: Tensor  # (hidden, dim)
    down_bias: Tensor  # (dim,)


class _Packed(NamedTuple):
    """Packed weights of the whole network; frequencies are the rotations in radians per position."""

    tokens: Tensor  # (K + 1, dim)
    blocks: list[_Block]
    logits: Tensor  # (dim, K)
    frequencies: Tensor  # (head width / 2,)


class _Unexpected(Exception):
    """The network is not built as this module knows it."""


class PackedStepper:
    """Cached decoding over packed weights, in their precision whatever the autocast.

    Batch and positions are those of ``embeds`` (B, N, dim), which is added to the token embeddings; ``heads``
    are the H heads of queries and the G of keys and values.
    """

    def __init__(self, packed: _Packed, heads: tuple[int, int], start: int, embeds: Tensor) -> None:
        batch, positions, dim = embeds.shape
        width = dim // heads[0]
        self._packed = packed
        self._added = rearrange(embeds, "b n d -> n b d").contiguous()
        self._start = torch.full((batch,), start, device=embeds.device)
        angles = torch.outer(torch.arange(positions, device=embeds.device).to(embeds), packed.frequencies)
        self._turns = torch.polar(torch.ones_like(angles), angles)  # (N, head width / 2) complex
        # Keys and values of all blocks, (B, G, N, head width) each; never read before they are written.
        shape = (len(packed.blocks), batch, heads[1], positions, width)
        self._keys = embeds.new_empty(shape).unbind()
        self._values = embeds.new_empty(shape).unbind()
        self._qkv_shape = (batch, heads[0] + 2 * heads[1], width)
        self._query_shape = (batch * heads[1], heads[0] // heads[1], width)
        self._heads = heads
        self._position = 0

    @torch.no_grad()
    def step(self, previous: Tensor | None) -> Tensor:
        """Logits (B, K) of the next position, given the code (B,) at the one before; None at the first."""
        i, queries = self._position, self._heads[0]
        rotated, seen = queries + self._heads[1], slice(i + 1)
        self._position += 1
        tokens = self._start if previous is None else previous
        with torch.autocast(tokens.device.type, enabled=False):
            x = F.embedding(tokens, self._packed.tokens) + self._added[i]  # (B, dim), the residual stream
            for block, keys, values in zip(self._packed.blocks, self._keys, self._values, strict=True):
                qkv = torch.mm(_normalize(x), block.qkv).view(self._qkv_shape)
                turned = _rotate(qkv[:, :rotated], self._turns[i])
                keys[:, :, i] = turned[:, queries:]
                values[:, :, i] = qkv[:, rotated:]
                query = turned[:, :queries].reshape(self._query_shape)  # (B * G, H / G, head width)
                weights = torch.bmm(query, keys.flatten(0, 1)[:, seen].mT).softmax(-1)
                attended = torch.bmm(weights, values.flatten(0, 1)[:, seen])
                x.addmm_(attended.view(x.shape), block.out)
                up, gate = torch.addmm(block.up_bias, _normalize(x), block.up).chunk(2, dim=1)
                x.addmm_(F.silu(gate).mul_(up), block.down).add_(block.down_bias)
            return torch.mm(_normalize(x), self._packed.logits)


class LibraryStepper:
    """The same by x-transformers' own cache; slower, and independent of how its networks are built."""

    def __init__(self, net: nn.Module, start: int, embeds: Tensor) -> None:
        self._net = net
        self._embeds = embeds
        self._previous = torch.full((len(embeds),), start, device=embeds.device)
        self._cache: Any = None
        self._position = 0

    @torch.no_grad()
    def step(self, previous: Tensor | None) -> Tensor:
        """Logits (B, K) of the next position, given the code (B,) at the one before; None at the first."""
        tokens = self._previous if previous is None else previous
        logits: Tensor
        logits, self._cache = self._net(
            tokens[:, None],
            sum_embeds=self._embeds[:, self._position : self._position + 1],
            return_intermediates=True,
            cache=self._cache,
            input_not_include_cache=True,
        )
        self._position += 1
        return logits[:, -1]


def make_stepper(net: nn.Module, heads: tuple[int, int], start: int, embeds: Tensor) -> PackedStepper | LibraryStepper:
    """The packed stepper over ``net``, or the library's, with a warning, if ``net`` is not built as expected.

    ``start`` is the token before the first position; ``embeds`` (B, N, dim) is added to the token embeddings.
    """
    try:
        packed = _pack(net, embeds.shape[-1], *heads)
        few = embeds[:1, :PROBED]
        _probe(net, PackedStepper(packed, heads, start, few), start, few)
    except _Unexpected as problem:
        warnings.warn(
            f"Sampling with the slower cache of x-transformers itself, as its network is not the expected one: "
            f"{problem}.",
            RuntimeWarning,
            stacklevel=3,
        )
        return LibraryStepper(net, start, embeds)
    return PackedStepper(packed, heads, start, embeds)


@torch.no_grad()
def _probe(net: nn.Module, stepper: PackedStepper, start: int, embeds: Tensor) -> None:
    """Compare ``stepper`` with the full pass of ``net`` over ``embeds`` (1, n, dim)."""
    tokens = torch.arange(start, start - embeds.shape[1], -1, device=embeds.device).clamp_min(0)
    stepped = torch.stack([stepper.step(token.expand(len(embeds))) for token in tokens], dim=1)
    with torch.autocast(embeds.device.type, enabled=False):
        full = net(tokens.expand(len(embeds), -1), sum_embeds=embeds)
    if not torch.allclose(stepped, full, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
        raise _Unexpected(f"the logits differ by {float((stepped - full).abs().max()):.2g}")


@torch.no_grad()
def _pack(net: nn.Module, dim: int, heads: int, kv_heads: int) -> _Packed:
    """Weights of ``net``, whose normalisation gains are stored less 1, packed.

    Raises:
        _Unexpected: a weight is missing, of another shape or precision, or left over.
    """
    left: dict[str, Tensor] = dict(net.state_dict())

    def take(name: str, *shape: int) -> Tensor:
        weight = left.pop(name, None)
        if weight is None or tuple(weight.shape) != shape or weight.dtype not in (torch.float32, torch.float64):
            found = "nothing" if weight is None else f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
            raise _Unexpected(f"'{name}' should be float32 or float64 {list(shape)}, found {found}")
        return weight

    def size(name: str) -> int:
        return len(left.get(name, ()))

    tokens = take("token_emb.emb.weight", size("token_emb.emb.weight"), dim)
    width = dim // heads
    blocks: list[_Block] = []
    while f"attn_layers.layers.{2 * len(blocks)}.1.to_q.weight" in left:
        attention, feed = (f"attn_layers.layers.{2 * len(blocks) + part}" for part in (0, 1))
        gain = take(f"{attention}.0.0.gamma", dim) + 1
        q = take(f"{attention}.1.to_q.weight", dim, dim) * width**-0.5
        k, v = (take(f"{attention}.1.to_{part}.weight", kv_heads * width, dim) for part in "kv")
        out = take(f"{attention}.1.to_out.weight", dim, dim)
        # The library's head number h reads the keys of head h modulo G.
        q = rearrange(q, "(r g d) i -> (g r d) i", g=kv_heads, d=width)
        out = rearrange(out, "o (r g d) -> o (g r d)", g=kv_heads, d=width)
        hidden = size(f"{feed}.1.ff.0.proj.bias") // 2
        feed_gain = take(f"{feed}.0.0.gamma", dim) + 1
        blocks.append(
            _Block(
                qkv=_transpose(torch.cat([q, k, v]) * gain),
                out=_transpose(out),
                up=_transpose(take(f"{feed}.1.ff.0.proj.weight", 2 * hidden, dim) * feed_gain),
                up_bias=take(f"{feed}.1.ff.0.proj.bias", 2 * hidden),
                down=_transpose(take(f"{feed}.1.ff.2.weight", dim, hidden)),
                down_bias=take(f"{feed}.1.ff.2.bias", dim),
            )
        )
    frequencies = take("attn_layers.rotary_pos_emb.inv_freq", width // 2)
    final_gain = take("attn_layers.final_norm.gamma", dim) + 1
    logits = _transpose(take("to_logits.weight", len(tokens) - 1, dim) * final_gain)
    if left:
        raise _Unexpected(f"it has weights unknown here ({', '.join(sorted(left))})")
    return _Packed(tokens, blocks, logits, frequencies)


def _transpose(weight: Tensor) -> Tensor:
    """(out, in) to a contiguous (in, out)."""
    return weight.t().contiguous()


def _normalize(x: Tensor) -> Tensor:
    """LayerNorm without its gain, which is in the matrix that follows."""
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Each pair of neighbouring numbers of x (..., width) as a complex number, times turn (width / 2,)."""
    pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)
