"""How many parameters a model has, as a whole and on one rank.

Letters: h hidden_size, q and k channels of all query heads and of all query groups, f ffn_hidden_size.
"""

from dataclasses import dataclass

from megakd.config import Model, Parallel, Pipeline
from megakd.config.fit import stages_of

VOCAB_MULTIPLE = 1024  # of the padded vocabulary, as in megakd.models.gpt


def padded_vocab(size: int) -> int:
    """The real vocabulary, filled up to a multiple of 1,024."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True)
class Parameters:
    """Of one rank.

    Attributes:
        dense: what data parallel ranks have alike.
        experts: those of experts that are divided over ranks (parallel.ep > 1), which fewer ranks have alike.
    """

    dense: int
    experts: int = 0

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(self.dense + other.dense, self.experts + other.experts)

    @property
    def total(self) -> int:
        return self.dense + self.experts


def whole_parameters(model: Model) -> int:
    """Of a model with its real vocabulary, a tied embedding once."""
    one = Parallel()
    layers = sum(layer_parameters(model, layer, one).total for layer in range(model.num_layers))
    head = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    return embedding_parameters(model, model.vocab_size) + layers + _norm(model, model.hidden_size) + head


def active_parameters(model: Model) -> int:
    """Of those that a token passes: of experts, the chosen ones."""
    if model.moe is None:
        return whole_parameters(model)
    bare = model.moe.model_copy(update={"num_experts": model.moe.top_k})
    routers = (model.moe.num_experts - model.moe.top_k) * model.hidden_size
    layers = sum(model.has_experts(layer) for layer in range(model.num_layers))
    return whole_parameters(model.model_copy(update={"moe": bare})) + layers * routers


def rank_parameters(model: Model, parallel: Parallel, padded: int, stage: int, pipeline: Pipeline) -> Parameters:
    """Of a rank of one pipeline stage, all its virtual stages together.

    Args:
        padded: columns of the vocabulary, over all tensor parallel ranks.
    """
    total = Parameters(0)
    for layer in layers_of(model, parallel, stage, pipeline):
        total += layer_parameters(model, layer, parallel)
    first, last = stage == 0, stage == parallel.pp - 1
    words = padded // parallel.tp
    ends = 0
    if first:
        ends += embedding_parameters(model, words)
    if last:
        ends += _norm(model, model.hidden_size)
        if not model.tie_embeddings or not first:  # tied, another stage's copy
            ends += words * model.hidden_size
    return total + Parameters(ends)


def layers_of(model: Model, parallel: Parallel, stage: int, pipeline: Pipeline) -> list[int]:
    """Numbers of the layers on a stage; virtual stages go round the ranks."""
    if parallel.vpp > 1:
        size = model.num_layers // (parallel.pp * parallel.vpp)
        starts = [(turn * parallel.pp + stage) * size for turn in range(parallel.vpp)]
        return [layer for start in starts for layer in range(start, start + size)]
    stages = stages_of(model.num_layers, parallel.pp, pipeline)
    return [layer for layer, where in enumerate(stages) if where == stage]


def embedding_parameters(model: Model, words: int) -> int:
    positions = model.max_sequence_length if model.position_embedding == "learned_absolute" else 0
    return (words + positions) * model.hidden_size


def layer_parameters(model: Model, layer: int, parallel: Parallel) -> Parameters:
    """Of one layer, counted from 0, on one rank of tp and ep."""
    h, norms = model.hidden_size, 0
    if model.pre_norms:
        norms += 1 if model.shared_norm else 2
    norms += 2 * model.post_norms
    own = norms * _norm(model, h)
    own += _attention(model, parallel.tp) if model.mla is None else _latent_attention(model, parallel.tp)
    if not model.has_experts(layer):
        return Parameters(own + _block(model, model.ffn_hidden_size, parallel.tp))
    moe, one_whole = model.moe, parallel.ep > 1
    own += moe.num_experts * h
    if moe.shared_ffn_hidden_size:
        own += _block(model, moe.shared_ffn_hidden_size, parallel.tp) + h * moe.shared_gate
    expert = _block(model, moe.ffn_hidden_size, 1 if one_whole else parallel.tp)
    experts = moe.num_experts // parallel.ep * expert
    return Parameters(own, experts) if one_whole else Parameters(own + experts)


def _norm(model: Model, width: int) -> int:
    return width * (2 if model.normalization == "LayerNorm" else 1)


def widths(model: Model) -> tuple[int, int]:
    """Channels of all query heads, and of all query groups."""
    heads = model.num_attention_heads
    return heads * model.head_channels, (model.num_query_groups or heads) * model.head_channels


def _attention(model: Model, tp: int) -> int:
    h, (q, k) = model.hidden_size, widths(model)
    count = ((q + 2 * k) * h + h * q) // tp
    if model.add_bias_linear or model.add_qkv_bias:
        count += (q + 2 * k) // tp
    if model.add_bias_linear:
        count += h
    if model.qk_norm and model.qk_norm_over == "all_heads":
        count += (q + k) // tp
    elif model.qk_norm:
        count += 2 * _norm(model, model.head_channels)
    return count


def _latent_attention(model: Model, tp: int) -> int:
    h, mla, heads = model.hidden_size, model.mla, model.num_attention_heads
    q = heads * model.head_channels
    low = mla.q_lora_rank
    queries = low * (h + q) // tp + _norm(model, low) if low else h * q // tp
    keys = (mla.kv_lora_rank + mla.qk_rope_head_dim) * h // tp + _norm(model, mla.kv_lora_rank)
    keys += mla.kv_lora_rank * heads * (mla.qk_head_dim + mla.v_head_dim) // tp
    return queries + keys + h * heads * mla.v_head_dim // tp


def _block(model: Model, inner: int, tp: int) -> int:
    """A feed-forward block or one expert."""
    h, first = model.hidden_size, inner * (2 if model.gated else 1)
    count = (first * h + h * inner) // tp
    if model.add_bias_linear:
        count += first // tp + h
    return count
