"""Megatron's GPTModel from a model section, with the output layer left to the loss.

Legend: T tokens, B micro-batch, S sequence, H hidden, V vocabulary, W this rank's vocabulary columns.
"""

import logging

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megakd.config import Pipeline
from megakd.kernels import VocabShard
from megakd.models.architecture import DTYPES, layer_specs, transformer_config
from megakd.models.blocks import needs_own_layers
from megakd.models.initialization import initialize_weights
from megakd.models.moe import keep_router_biases_whole, share_latents
from megakd.models.output_layer import OutputLayer
from megakd.models.rotary import inverse_frequencies

try:
    import transformer_engine.pytorch  # noqa: F401

    HAVE_TE = True
except ImportError:
    HAVE_TE = False

LOG = logging.getLogger("megakd")
VOCAB_MULTIPLE = 1024  # of the padded vocabulary, whatever the layout, so that weights do not depend on it


class GPT(OutputLayer, GPTModel):
    """A GPTModel whose forward ends at the final norm: the head is run by the loss, on supervised rows only.

    Megatron's own forward computes logits for every position, transposes them and copies them once more. Here the
    last stage returns hidden states [S, B, H] (under sequence parallelism [S / tp, B, H]), the loss selects rows
    and calls `head_input` and `head_weight`, or `logits`.

    Attributes:
        shard: this rank's columns of the head.
        chunks: the parts of all virtual stages of this rank, itself included, in order.
        whole_output: forward returns [S, B, H] under sequence parallelism too; without gradient.
    """

    shard: VocabShard
    chunks: list["GPT"]
    whole_output: bool = False

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if self.whole_output and self.config.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(hidden_states, group=self.pg_collection.tp)
        return hidden_states

    def head_input(self, hidden_SBH: Tensor, rows_T: Tensor | None = None, *, whole_gradient: bool = False) -> Tensor:
        """Rows for the column-parallel head, in sequence-major order.

        Args:
            hidden_SBH: what forward returned on the last stage.
            rows_T: int64 rows s * B + b to keep, equal on all tensor-parallel ranks; None keeps all.
            whole_gradient: what follows sums the gradient over tensor-parallel ranks itself.
        Returns:
            hidden_TH, whole on every tensor-parallel rank.
        Collectives: backward all-reduces the gradient over tp; with sequence parallelism forward all-gathers and
            backward reduce-scatters.
        """
        tp = self.pg_collection.tp
        if self.config.sequence_parallel and not self.whole_output:
            hidden_SBH = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=not whole_gradient, group=tp
            )
        hidden_TH = hidden_SBH.flatten(0, 1)
        if rows_T is not None:
            hidden_TH = hidden_TH.index_select(0, rows_T)
        if (divisor := self.config.model.logit_divisor) != 1.0:
            hidden_TH = hidden_TH / divisor
        if not self.config.sequence_parallel and not whole_gradient:
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
        return self.logits_of(self.head_input(hidden_SBH, rows_T))

    @property
    def softcap(self) -> float | None:
        """Of the logits."""
        return self.config.model.logit_softcap

    @property
    def logit_bytes(self) -> int:
        """Of one logit; stages without an output layer know it too."""
        return self.config.params_dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Of a token's hidden state, wherever the weights are."""
        return self.config.hidden_size * self.config.params_dtype.itemsize


def multiply_output(embedding, args, hidden_SBH: Tensor) -> Tensor:
    """Forward hook of an embedding: its model's multiplier, rounded to the weights' type as transformers does."""
    return hidden_SBH * torch.tensor(embedding.config.model.embedding_multiplier, dtype=hidden_SBH.dtype)


def padded_vocab_size(vocab_size: int) -> int:
    """The real vocabulary, filled up to a multiple of 1,024."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def build_gpt(
    model,
    parallel,
    train,
    groups,
    *,
    vocab_size: int,
    padded_size: int,
    device,
    seed: int | None,
    name: str = "model",
    local: bool = False,
    pipeline: Pipeline = Pipeline(),  # noqa: B008  frozen
) -> GPT:
    """Build this rank's part of a GPT.

    Args:
        model: the model section of a config or a checkpoint.
        parallel, train: sections of the run's config; layout, precision and recomputation are taken from them.
        groups: Megatron's ProcessGroupCollection.
        vocab_size, padded_size: the tokenizer's vocabulary and the columns that are really there.
        device: torch device of the weights.
        seed: draw initial weights from it, the same for every layout; None leaves them uninitialised (to be loaded).
        name: what the log calls it.
        local: Megatron's local layers even where Transformer Engine is there: their attention takes a KV cache.
        pipeline: the split of its layers over stages.
    Returns:
        the part; of several virtual stages the last, which has the others as `chunks`.
    """
    transformer_engine = HAVE_TE and torch.device(device).type == "cuda" and not (local or needs_own_layers(model))
    config = transformer_config(model, parallel, train, transformer_engine, pipeline)
    chunks = [
        build_chunk(config, groups, None if parallel.vpp == 1 else stage, padded_size, transformer_engine)
        for stage in range(parallel.vpp)
    ]
    width = padded_size // groups.tp.size()
    start = groups.tp.rank() * width
    for gpt in chunks:
        gpt.to(device=device, dtype=DTYPES[train.precision])
        keep_router_biases_whole(gpt)
        gpt.shard = VocabShard(start, start + width, vocab_size, groups.tp if groups.tp.size() > 1 else None)
        if seed is not None:
            initialize_weights(gpt, seed)
    gpt.chunks = chunks
    parts = "Transformer Engine layers" if transformer_engine else "Megatron's local layers with torch SDPA attention"
    LOG.info("%s: %s, %d layers, hidden %d, %s", name, train.precision, model.num_layers, model.hidden_size, parts)
    return gpt


def build_chunk(config, groups, vp_stage: int | None, padded_size: int, transformer_engine: bool) -> GPT:
    """The layers of one stage, without weights.

    Args:
        vp_stage: which of the rank's virtual stages; None where there is one stage.
    """
    model, rank, vpp = config.model, groups.pp.rank(), config.virtual_pipeline_model_parallel_size or 1
    first = rank == 0 and vp_stage in (None, 0)
    gpt = GPT(
        config,
        layer_specs(config, transformer_engine, rank, vp_stage),
        vocab_size=padded_size,
        max_sequence_length=model.max_sequence_length,
        pre_process=first,
        post_process=rank == groups.pp.size() - 1 and vp_stage in (None, vpp - 1),
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type=model.position_embedding,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    if first and model.embedding_multiplier != 1.0:
        gpt.embedding.register_forward_hook(multiply_output)
    if model.rope_scaling is not None and model.mla is None:
        gpt.rotary_pos_emb.inv_freq = inverse_frequencies(model).to(gpt.rotary_pos_emb.inv_freq.device)
    if model.mla is not None and groups.tp.size() > 1:
        share_latents(gpt)
    return gpt
