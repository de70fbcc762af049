"""How many parameters an architecture has, and how many of them a rank holds.

Legend: h hidden size, q and k channels of all query and key heads, f inner width of a feed-forward block.
"""

from dataclasses import dataclass

from megakd.config.model import Model
from megakd.config.sections import Parallel

VOCAB_MULTIPLE = 1024  # of the padded vocabulary


@dataclass(frozen=True)
class Count:
    """Parameters of a part of a model.

    Attributes:
        cut: divided over tensor parallel ranks.
        whole: on each of them.
    """

    cut: int = 0
    whole: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.cut + other.cut, self.whole + other.whole)

    @property
    def total(self) -> int:
        return self.cut + self.whole

    def on_rank(self, tp: int) -> int:
        return self.cut // tp + self.whole


def padded_vocab(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def count_parameters(model: Model, padded_size: int) -> int:
    """All parameters, those of padded columns included."""
    layers = sum((count_layer(model, number) for number in range(model.num_layers)), Count())
    return (layers + _ends(model, padded_size, first=True, last=True)).total


def rank_parameters(model: Model, parallel: Parallel, padded_size: int, stage: int) -> int:
    """Parameters that a rank of one pipeline stage holds; a tied head stands on the first and on the last stage."""
    size = model.num_layers // parallel.pp
    layers = sum((count_layer(model, number) for number in range(stage * size, (stage + 1) * size)), Count())
    ends = _ends(model, padded_size, first=stage == 0, last=stage == parallel.pp - 1)
    return (layers + ends).on_rank(parallel.tp)


def count_layer(model: Model, number: int) -> Count:
    norm = _norm(model, model.hidden_size)
    norms = (0 if not model.pre_norms else 1 if model.shared_norm else 2) + (2 if model.post_norms else 0)
    attention = _latent_attention(model) if model.mla else _attention(model)
    block = _experts(model) if model.has_experts(number) else _feed_forward(model, model.ffn_hidden_size)
    return attention + block + Count(whole=norms * norm)


def _norm(model: Model, width: int) -> int:
    return width * (2 if model.normalization == "LayerNorm" else 1)


def _ends(model: Model, padded_size: int, *, first: bool, last: bool) -> Count:
    """Embedding, positions, final norm and head, as far as a stage has them."""
    table = Count(cut=padded_size * model.hidden_size)
    found = Count()
    if first:
        positions = model.max_sequence_length if model.position_embedding == "learned_absolute" else 0
        found += table + Count(whole=positions * model.hidden_size)
    if last:
        found += Count(whole=_norm(model, model.hidden_size))
        if not model.tie_embeddings or not first:
            found += table
    return found


def _attention(model: Model) -> Count:
    h, heads = model.hidden_size, model.num_attention_heads
    q, k = (n * model.head_channels for n in (heads, model.num_query_groups or heads))
    found = Count(cut=h * (q + 2 * k) + q * h)
    if model.add_bias_linear or model.add_qkv_bias:
        found += Count(cut=q + 2 * k)
    if model.add_bias_linear:
        found += Count(whole=h)
    if model.qk_norm and model.qk_norm_over == "head":
        found += Count(whole=2 * _norm(model, model.head_channels))
    elif model.qk_norm:
        found += Count(cut=_norm(model, q) + _norm(model, k))
    return found


def _latent_attention(model: Model) -> Count:
    h, heads, mla = model.hidden_size, model.num_attention_heads, model.mla
    query = heads * model.head_channels
    found = Count(cut=mla.kv_lora_rank * heads * (mla.qk_head_dim + mla.v_head_dim) + heads * mla.v_head_dim * h)
    found += Count(cut=h * (mla.kv_lora_rank + mla.qk_rope_head_dim), whole=_norm(model, mla.kv_lora_rank))
    if mla.q_lora_rank is None:
        return found + Count(cut=h * query)
    return found + Count(cut=h * mla.q_lora_rank + mla.q_lora_rank * query, whole=_norm(model, mla.q_lora_rank))


def _feed_forward(model: Model, f: int) -> Count:
    first = f * (2 if model.gated else 1)
    found = Count(cut=model.hidden_size * (first + f))
    return found + Count(cut=first, whole=model.hidden_size) if model.add_bias_linear else found


def _experts(model: Model) -> Count:
    moe, h = model.moe, model.hidden_size
    found = Count(whole=h * moe.num_experts)
    one = _feed_forward(model, moe.ffn_hidden_size)
    found += Count(one.cut * moe.num_experts, one.whole * moe.num_experts)
    if moe.shared_ffn_hidden_size is not None:
        found += _feed_forward(model, moe.shared_ffn_hidden_size) + Count(whole=h if moe.shared_gate else 0)
    return found
