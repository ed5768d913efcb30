"""A transformer decoder over the code map, flattened in scan order.

Vaswani et al. 2017 (arXiv 1706.03762), built by the x-transformers library: pre-norm blocks, rotary positions
(Su et al. 2021, arXiv 2104.09864), SwiGLU feedforwards (Shazeer 2020, arXiv 2002.05202) and flash attention.
Over the rotary positions, which know distances along the scan, lie learned row and column embeddings, which
know the map, in any scan order. Coarser codes and the label come aligned: the input that predicts position i
carries the conditioning and the place of position i, beside the code of position i - 1 (at the first position, a
start token). So no length is spent on a prefix, and a finer level costs only its own codes.

Sampling with cached keys and values is `priors.transformer_step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from x_transformers import Decoder, TransformerWrapper

from priors.autoregressive import AutoregressivePrior, Stepper
from priors.base import PriorSpec, evaluating
from priors.conditioning import Conditioner
from priors.registry import register
from priors.scan import Scan, to_maps, to_sequence
from priors.transformer_step import make_stepper
from vqgen.codes import Codes
from vqgen.config import Settings


class TransformerConfig(Settings):
    """Architecture of the transformer prior."""

    dim: int = Field(256, ge=4)
    """Width of the residual stream."""
    depth: int = Field(6, ge=1, le=1000)
    """Blocks of attention and feedforward."""
    heads: int = Field(8, ge=2, le=1024)
    """Attention heads, each dim / heads wide; at least 2, as x-transformers builds a single head differently."""
    kv_heads: int = Field(2, ge=1)
    """Heads of keys and values, shared by the others (Ainslie et al. 2023, arXiv 2305.13245); few sample faster."""
    ff_mult: float = Field(2.5, gt=0)
    """Hidden width of the gated feedforward, in multiples of dim."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the embeddings and of what every block adds; attention itself stays whole, and so fast."""
    condition_blocks: int = Field(2, ge=0)
    """Residual blocks over the coarser codes."""
    label_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of training labels hidden from the model; guidance needs some."""
    scan: Scan = "raster"
    """Order in which positions are visited: raster, column or snake (every second row from right to left)."""

    @model_validator(mode="after")
    def _widths(self) -> TransformerConfig:
        if self.dim % (2 * self.heads) or self.dim < 4 * self.heads:
            raise ValueError(
                f"dim must be a multiple of 2 * heads and at least 4 * heads, got dim {self.dim} and heads {self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if int(self.dim * self.ff_mult) < 1:
            raise ValueError(f"ff_mult {self.ff_mult} leaves no hidden unit at dim {self.dim}")
        return self


@register
class Transformer(AutoregressivePrior):
    """p(codes of one level | coarser levels, label), one code after another."""

    name: ClassVar[str] = "transformer"
    summary: ClassVar[str] = "transformer decoder over the flattened map (x-transformers), keys and values cached"
    Config: ClassVar[type[Settings]] = TransformerConfig
    training_defaults: ClassVar[dict[str, Any]] = {
        "steps": 10000,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "betas": (0.9, 0.95),
        "weight_decay": 0.01,
        "clip": 1.0,
        "schedule": "cosine",
        "warmup": 0.02,
        "weight_ema": 0.999,
    }

    config: TransformerConfig

    def __init__(self, config: Settings | Mapping[str, Any], spec: PriorSpec) -> None:
        super().__init__(config, spec)
        settings, target = self.config, spec.target
        self.net = TransformerWrapper(
            num_tokens=target.codebook_size + 1,
            logits_dim=target.codebook_size,
            max_seq_len=target.positions,
            use_abs_pos_emb=False,
            emb_dropout=settings.dropout,
            attn_layers=Decoder(
                dim=settings.dim,
                depth=settings.depth,
                heads=settings.heads,
                rotary_pos_emb=True,
                rotary_emb_dim=settings.dim // settings.heads,
                attn_dim_head=settings.dim // settings.heads,
                attn_kv_heads=settings.kv_heads,
                attn_flash=True,
                norm_add_unit_offset=True,
                attn_sublayer_dropout=settings.dropout,
                ff_glu=True,
                ff_swish=True,
                ff_mult=settings.ff_mult,
                ff_sublayer_dropout=settings.dropout,
                verbose=False,
            ),
        )
        self.rows = nn.Parameter(torch.randn(target.height, settings.dim) * 0.02)
        self.columns = nn.Parameter(torch.randn(target.width, settings.dim) * 0.02)
        self.conditioner = Conditioner(spec, settings.dim, settings.condition_blocks)

    @property
    def start(self) -> int:
        """The token before the first code: one past the codebook."""
        return self.spec.target.codebook_size

    def embeds(self, context: Codes, label: Tensor | None, batch_size: int) -> Tensor:
        """What is added to the input that predicts each position: place and conditioning.

        (B, h * w, dim), in scan order.
        """
        places = rearrange(self.rows, "h d -> 1 h 1 d") + rearrange(self.columns, "w d -> 1 1 w d")
        given = rearrange(self.conditioner(context, label, batch_size), "b d h w -> b h w d")
        return to_sequence(places + given, self.scan)

    def logits(self, codes: Tensor, context: Codes = (), label: Tensor | None = None) -> Tensor:
        """Logits (B, h, w, K) of every code given those before it in the scan, from codes (B, h, w) in one pass."""
        tokens = F.pad(to_sequence(codes, self.scan)[:, :-1], (1, 0), value=self.start)
        logits: Tensor = self.net(tokens, sum_embeds=self.embeds(context, label, len(codes)))
        return to_maps(logits, self.spec.target.height, self.spec.target.width, self.scan)

    @torch.no_grad()
    def stepper(self, batch_size: int, context: Codes = (), label: Tensor | None = None) -> Stepper:
        """Logits one position at a time, from the weights as they are now; see `priors.transformer_step`."""
        heads = (self.config.heads, self.config.kv_heads)
        with evaluating(self):
            return make_stepper(self.net, heads, self.start, self.embeds(context, label, batch_size))
