"""Megatron's GPTModel from a model section, with the output layer left to the loss.

Legend: T tokens, B micro-batch, S sequence, H hidden, V vocabulary, W this rank's vocabulary columns.
"""

import logging

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from megakd.kernels import VocabShard
from megakd.models.attention import Norm, SdpaAttention
from megakd.models.initialization import initialize_weights

try:
    import transformer_engine.pytorch  # noqa: F401

    HAVE_TE = True
except ImportError:
    HAVE_TE = False

LOG = logging.getLogger("megakd")
VOCAB_MULTIPLE = 1024  # of the padded vocabulary, whatever the layout, so that weights do not depend on it
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ACTIVATIONS = {"swiglu": F.silu, "gelu": F.gelu}


class GPT(GPTModel):
    """A GPTModel whose forward ends at the final norm: the head is run by the loss, on supervised rows only.

    Megatron's own forward computes logits for every position, transposes them and copies them once more. Here the
    last stage returns hidden states [S, B, H] (under sequence parallelism [S / tp, B, H]), the loss selects rows
    and calls `head_input` and `head_weight`, or `logits`.
    """

    shard: VocabShard

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states

    def head_input(self, hidden_SBH: Tensor, rows_T: Tensor | None = None) -> Tensor:
        """Rows for the column-parallel head, in sequence-major order.

        Args:
            hidden_SBH: what forward returned on the last stage.
            rows_T: int64 rows s * B + b to keep, equal on all tensor-parallel ranks; None keeps all.
        Returns:
            hidden_TH, whole on every tensor-parallel rank.
        Collectives: backward all-reduces the gradient over tp; with sequence parallelism forward all-gathers and
            backward reduce-scatters.
        """
        tp = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_SBH = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=True, group=tp
            )
        hidden_TH = hidden_SBH.flatten(0, 1)
        if rows_T is not None:
            hidden_TH = hidden_TH.index_select(0, rows_T)
        if not self.config.sequence_parallel:
            hidden_TH = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_TH, group=tp)
        return hidden_TH

    @property
    def head_weight(self) -> Tensor:
        """[W, H], the embedding's own weight when tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def logits(self, hidden_SBH: Tensor, rows_T: Tensor | None = None) -> Tensor:
        """[T, W]: this rank's columns, padded ones included (the kernels leave those out)."""
        return F.linear(self.head_input(hidden_SBH, rows_T), self.head_weight)


def padded_vocab_size(vocab_size: int) -> int:
    """The real vocabulary, filled up to a multiple of 1,024."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def build_gpt(model, parallel, train, groups, *, vocab_size: int, padded_size: int, device, seed: int | None) -> GPT:
    """Build this rank's part of a GPT.

    Args:
        model: the model section of a config or a checkpoint.
        parallel, train: sections of the run's config; layout, precision and recomputation are taken from them.
        groups: Megatron's ProcessGroupCollection.
        vocab_size, padded_size: the tokenizer's vocabulary and the columns that are really there.
        device: torch device of the weights.
        seed: draw initial weights from it, the same for every layout; None leaves them uninitialised (to be loaded).
    """
    transformer_engine = HAVE_TE and torch.device(device).type == "cuda"
    config = transformer_config(model, parallel, train, transformer_engine)
    first, last = groups.pp.rank() == 0, groups.pp.rank() == groups.pp.size() - 1
    gpt = GPT(
        config,
        layer_spec(config, transformer_engine),
        vocab_size=padded_size,
        max_sequence_length=model.max_sequence_length,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type=model.position_embedding,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        pg_collection=groups,
    )
    gpt.to(device=device, dtype=DTYPES[train.precision])
    width = padded_size // groups.tp.size()
    start = groups.tp.rank() * width
    gpt.shard = VocabShard(start, start + width, vocab_size, groups.tp if groups.tp.size() > 1 else None)
    if seed is not None:
        initialize_weights(gpt, seed)
    parts = "Transformer Engine layers" if transformer_engine else "Megatron's local layers with torch SDPA attention"
    LOG.info("model: %s, %d layers, hidden %d, %s", train.precision, model.num_layers, model.hidden_size, parts)
    return gpt


def transformer_config(model, parallel, train, transformer_engine: bool) -> TransformerConfig:
    """Megatron's TransformerConfig for a model section; one place, so that student and teacher cannot differ in it."""
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.activation == "swiglu",
        activation_func=ACTIVATIONS[model.activation],
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_std,
        init_method=leave,  # initialization.py draws, the same for every layout; perform_initialization=False would
        output_layer_init_method=leave,  # also leave out the attributes that gradient norms and slicing go by
        embedding_init_method=leave,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        sequence_parallel=parallel.sp,
        params_dtype=DTYPES[train.precision],
        pipeline_dtype=DTYPES[train.precision],
        bf16=train.precision == "bf16",
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=transformer_engine,
        cuda_graph_scope=[],
        recompute_granularity=None if train.recompute == "none" else train.recompute,
        recompute_method="uniform" if train.recompute == "full" else None,
        recompute_num_layers=1 if train.recompute == "full" else None,
    )


def leave(weight: Tensor) -> Tensor:
    return weight


def layer_spec(config: TransformerConfig, transformer_engine: bool):
    if transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec()
    layer = get_gpt_layer_local_spec(normalization=config.normalization)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    layer.submodules.self_attention.submodules.core_attention = SdpaAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=Norm)
