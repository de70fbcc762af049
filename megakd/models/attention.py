"""The modules the local layer spec lacks: norms that know sequence and tensor parallelism, attention through SDPA.

Legend: S sequence, B micro-batch, N heads of this rank, G query groups of this rank, D head dimension.
"""

import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megakd.models.context import in_order, own_chunks


class ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is gain - 1; computed in float32 whatever the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps).type_as(x)


class ZeroCenteredLayerNorm(torch.nn.LayerNorm):
    """LayerNorm whose weight is gain - 1; computed in float32 whatever the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        gain, bias = 1.0 + self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, gain, bias, self.eps).type_as(x)


NORMS = {
    ("RMSNorm", False): torch.nn.RMSNorm,
    ("LayerNorm", False): torch.nn.LayerNorm,
    ("RMSNorm", True): ZeroCenteredRMSNorm,
    ("LayerNorm", True): ZeroCenteredLayerNorm,
}


class Norm:
    """RMSNorm or LayerNorm, marked so that Megatron sums its gradients over sequence-parallel ranks."""

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, **unused):
        norm = NORMS[config.normalization, config.layernorm_zero_centered_gamma](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class NormOverHeads(torch.nn.Module):
    """RMSNorm of queries or keys over all heads together; each tensor parallel rank holds its own heads' gains.

    Args:
        heads: of the whole model: query heads, or query groups.
        channels: of one head.
    Attributes:
        group: tensor parallel ranks; set by the layer.
    Collectives: forward sums one float32 per token over them, backward its gradient.
    """

    def __init__(self, config, channels: int, eps: float, heads: int):
        super().__init__()
        own = heads // config.tensor_model_parallel_size
        assert own * config.tensor_model_parallel_size == heads, f"{heads} heads on {config.tensor_model_parallel_size}"
        self.weight = torch.nn.Parameter(torch.ones(own * channels, dtype=config.params_dtype))
        self.weight.tensor_model_parallel, self.weight.partition_dim, self.weight.partition_stride = True, 0, 1
        self.eps, self.width, self.group = eps, heads * channels, None

    def forward(self, x_SBND: Tensor) -> Tensor:
        values = x_SBND.float()
        mean = SumOverRanks.apply(values.square().sum((2, 3), keepdim=True), self.group) / self.width
        gain_ND = self.weight.float().view(x_SBND.shape[2:])
        return (values * torch.rsqrt(mean + self.eps) * gain_ND).type_as(x_SBND)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        groups = {"tp_group": self.group, "dp_cp_group": metadata["dp_cp_group"]}
        state = self.state_dict(keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)


class NormOfQueries:
    """Megatron builds a class, not a function."""

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, **unused):
        return NormOverHeads(config, hidden_size, eps, config.num_attention_heads)


class NormOfKeys:
    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, **unused):
        return NormOverHeads(config, hidden_size, eps, config.num_query_groups)


class SumOverRanks(torch.autograd.Function):
    """A sum over ranks that each of them goes on to use: its gradient is summed over them as well."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class SdpaAttention(MegatronModule):
    """Megatron's core attention by torch.nn.functional.scaled_dot_product_attention: causal, grouped queries.

    With an explicit attention_mask ([B or 1, 1, S, S], True = hidden, as everywhere in Megatron) that mask is used
    as it is; without one, `causal` attention. A layer with a sliding window hides what is outside of it as well.
    Scores are never kept: memory is linear in S where torch has a fused kernel, on CPU too; but a soft cap on the
    scores (`config.model.attention_softcap`) has none and keeps them. The segments of a packed row (thd) are attended
    to one by one.

    Where the sequence is cut over context parallel ranks (megakd.models.context) each gathers the keys and values of
    all, and attends from its two chunks to what is before them.

    Attributes:
        cache: a `megakd.models.kv_cache.LayerCache` that takes over while sequences are generated, else None.
    Collectives: over cp, of keys and values: an all-gather in forward, a reduce-scatter of their gradients in backward.
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        k_channels=None,
        v_channels=None,
        cp_comm_type=None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.softcap = config.model.attention_softcap
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.model.sliding_window if windowed else None
        self.cache = None
        self.cp = pg_collection.cp

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
        """[S, B, N, D], [S, B, G, D], [S, B, G, D] -> [S, B, N * D]; of a packed row without the axis B, in and out."""
        assert attention_bias is None, "SdpaAttention takes a mask, not a bias"
        if self.cache is not None:
            return self.cache.attend(self, query, key, value)
        if packed_seq_params is not None:
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            segments = zip(*(x[:, None].split(lengths) for x in (query, key, value)), strict=True)
            return torch.cat([self.attend(*segment, None, causal=True)[:, 0] for segment in segments])
        if self.cp.size() > 1:
            assert attention_mask is None, "a sequence that is cut over ranks is causal"
            return self._attend_from_chunks(query, key, value)
        causal = attention_mask is None and (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        return self.attend(query, key, value, attention_mask, causal=causal)

    def _attend_from_chunks(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """This rank's chunks of the queries, each with the keys that it sees."""
        rank, ranks, chunk = self.cp.rank(), self.cp.size(), query.size(0) // 2
        key, value = (
            in_order(gather_from_sequence_parallel_region(x.contiguous(), group=self.cp), ranks) for x in (key, value)
        )
        parts = []
        for number, part in zip(own_chunks(rank, ranks), query.chunk(2), strict=True):
            start, stop = number * chunk, (number + 1) * chunk
            first = 0 if self.window is None else max(0, start - self.window + 1)
            positions = torch.arange(first, stop, device=query.device)
            age = positions[start - first :, None] - positions
            hidden = age < 0 if self.window is None else (age < 0) | (age >= self.window)
            parts.append(self._scaled(part, key[first:stop], value[first:stop], hidden[None, None], causal=False))
        return torch.cat(parts)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, causal: bool
    ) -> Tensor:
        """[S, B, N, D], [S, B, G, D], [S, B, G, D] -> [S, B, N * D]."""
        if self.window is not None and query.size(0) > self.window:
            attention_mask, causal = self._windowed(attention_mask, query.size(0), query.device), False
        return self._scaled(query, key, value, attention_mask, causal=causal)

    def _scaled(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, causal: bool
    ) -> Tensor:
        """As `attend`, with a mask in which the window is."""
        seen = None if attention_mask is None else ~attention_mask
        parts = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return self.attend_heads(*parts, attn_mask=seen, is_causal=causal).permute(2, 0, 1, 3).flatten(2)

    def attend_heads(self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None, is_causal=False):
        """[B, N, S, D] as of scaled_dot_product_attention, whose mask is True where a key is seen."""
        attend = F.scaled_dot_product_attention if self.softcap is None else self._attend_softly
        dropout = self.dropout if self.training else 0.0
        with get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            return attend(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout,
                is_causal=is_causal,
                scale=self.softmax_scale,
                enable_gqa=query.size(1) != key.size(1),
            )

    def _windowed(self, attention_mask: Tensor | None, length: int, device) -> Tensor:
        """The mask (None: causal) with what lies outside the window hidden too."""
        age = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
        outside = age >= self.window
        return (outside | (age < 0))[None, None] if attention_mask is None else attention_mask | outside

    def _attend_softly(self, query, key, value, *, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> Tensor:
        """scaled_dot_product_attention with scores softcap * tanh(score / softcap); [B, N, S, D] as there."""
        if enable_gqa:
            key, value = (x.repeat_interleave(query.size(1) // x.size(1), 1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * (query.size(3) ** -0.5 if scale is None else scale)
        scores = self.softcap * torch.tanh(scores / self.softcap)
        if is_causal:
            attn_mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        weights = F.dropout(scores.float().softmax(3).type_as(value), dropout_p)
        return weights @ value
