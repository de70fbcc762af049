"""The two modules the local layer spec lacks: norms that know sequence parallelism, attention through torch's SDPA.

Legend: S sequence, B micro-batch, N heads of this rank, G query groups of this rank, D head dimension.
"""

import contextlib

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class Norm:
    """torch's RMSNorm or LayerNorm, marked so that Megatron sums its gradients over sequence-parallel ranks."""

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, **unused):
        kind = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
        norm = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class SdpaAttention(MegatronModule):
    """Megatron's core attention by torch.nn.functional.scaled_dot_product_attention: causal, grouped queries.

    With an explicit attention_mask ([B or 1, 1, S, S], True = hidden, as everywhere in Megatron) that mask is used
    as it is; without one, `causal` attention. Scores are never kept: memory is linear in S where torch has a fused
    kernel, on CPU too.
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
    ) -> Tensor:
        """[S, B, N, D], [S, B, G, D], [S, B, G, D] -> [S, B, N * D]."""
        assert attention_bias is None and packed_seq_params is None, "SdpaAttention takes a mask, not a bias or a pack"
        causal = attention_mask is None and (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        dropout = self.dropout if self.training else 0.0
        with get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            context = F.scaled_dot_product_attention(
                *(x.permute(1, 2, 0, 3) for x in (query, key, value)),
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=dropout,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=query.size(2) != key.size(2),
            )
        return context.permute(2, 0, 1, 3).flatten(2)
