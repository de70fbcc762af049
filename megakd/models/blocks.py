"""Layers that Megatron has no switch for: parallel residual, norms elsewhere, a rotary base per layer, factors."""

from collections.abc import Callable

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megakd.config import Model
from megakd.models.attention import Norm


def needs_own_layers(model: Model) -> bool:
    """Whether the model has what only the classes of this module and `SdpaAttention` compute."""
    return bool(
        model.parallel_residual
        or model.post_norms
        or model.attention_softcap
        or model.sliding_window_rotary_base
        or model.residual_multiplier != 1.0
        or model.qk_norm_over == "all_heads"
    )


class Layer(TransformerLayer):
    """Megatron's layer with the residual and the rotary base of the model section (`config.model`)."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        model: Model = config.model
        if model.residual_multiplier != 1.0:
            self.self_attn_bda = scaled(self.self_attn_bda, model.residual_multiplier)
            self.mlp_bda = scaled(self.mlp_bda, model.residual_multiplier)
        if model.qk_norm_over == "all_heads":
            for norm in (self.self_attention.q_layernorm, self.self_attention.k_layernorm):
                norm.group = self.pg_collection.tp
        self.own_rotary = None
        if model.sliding_window_rotary_base is not None and model.has_window(self.layer_number - 1):
            self.own_rotary = RotaryEmbedding(
                model.head_channels,
                model.rotary_percent,
                rotary_base=model.sliding_window_rotary_base,
                cp_group=self.pg_collection.cp,
            )

    def forward(self, hidden_states: Tensor, **kwargs):
        """[S, B, H] -> ([S, B, H], None); keyword arguments are TransformerLayer's."""
        kwargs.pop("dynamic_inference_decode_only", None)
        if self.own_rotary is not None:
            kwargs["rotary_pos_emb"] = self.own_rotary(kwargs["rotary_pos_emb"].shape[0] * self.pg_collection.cp.size())
        if not self.config.model.parallel_residual:
            return super().forward(hidden_states=hidden_states, **kwargs)
        attended, context = self._forward_attention(hidden_states, **kwargs)
        norm = self.input_layernorm if self.config.model.shared_norm else self.pre_mlp_layernorm
        output_with_bias = self.mlp(norm(hidden_states))
        with self.bias_dropout_add_exec_handler():
            add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
            return add(output_with_bias, attended, self.hidden_dropout), context


def scaled(build_add: Callable, factor: float) -> Callable:
    """Megatron's builder of the residual sum (with bias and dropout), for a block whose output is multiplied first."""

    def build(training: bool, fused: bool) -> Callable:
        add = build_add(training, fused)

        def add_scaled(output_with_bias, residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_with_bias
            return add((output * factor, None if bias is None else bias * factor), residual, dropout)

        return add_scaled

    return build


class NormedRowParallelLinear(RowParallelLinear):
    """The linear layer that ends a block, and a norm after it; its weight is saved as `post_layernorm.weight`.

    The bias is added before the norm, so none is left for the caller.
    """

    def __init__(self, input_size: int, output_size: int, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = Norm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: Tensor):
        output, bias = super().forward(input_)
        return self.post_layernorm(output if bias is None else output + bias), None
