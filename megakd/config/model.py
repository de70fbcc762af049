"""The model section: what an architecture is, in a student's YAML and in every checkpoint folder."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megakd.config.section import BelowOne, Count, CountOrZero, NotNegative, Positive, Section, Share
from megakd.limits import advice, excess


class RopeScaling(Section):
    """Rotary frequencies stretched for long sequences"""

    kind: Literal["linear", "llama3", "yarn"]
    """`linear` divides all frequencies, `llama3` the low ones, `yarn` (with mla only) by a ramp over the channels."""
    factor: Positive
    """What frequencies are divided by."""
    original_length: Count | None = None
    """Sequence length before the stretching, in tokens (llama3 and yarn, and needed there)."""
    low_freq_factor: Positive = 1.0
    """Wavelengths above original_length / this are divided fully (llama3 only)."""
    high_freq_factor: Positive = 4.0
    """Wavelengths below original_length / this are left alone (llama3 only)."""
    beta_fast: Positive = 32.0
    """Turns over original_length above which a frequency is left alone (yarn only)."""
    beta_slow: Positive = 1.0
    """Turns over original_length below which a frequency is divided fully (yarn only)."""
    mscale: NotNegative = 1.0
    """Weight of ln(factor) in the factor on rotated channels (yarn only)."""
    mscale_all_dim: NotNegative = 0.0
    """Weight of ln(factor) in the factor on attention scores (yarn only)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.kind != "linear" and self.original_length is None:
            yield "original_length", f"missing; kind {self.kind} needs it"
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            yield "low_freq_factor", f"{self.low_freq_factor} is not below high_freq_factor = {self.high_freq_factor}"


class MoE(Section):
    """A router that sends every token to a few of many feed-forward experts"""

    num_experts: Count
    """Experts of a layer."""
    top_k: Count
    """Experts that a token is sent to."""
    ffn_hidden_size: Count
    """Inner width of one expert, in channels."""
    layers: list[CountOrZero] | None = None
    """Layers, counted from 0, that have experts; null: all. The others have the ordinary block."""
    shared_ffn_hidden_size: Count | None = None
    """Inner width of the expert that every token passes; null: there is none."""
    shared_gate: bool = False
    """The shared expert's output is weighted by a gate of its own."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What makes a router's logits scores."""
    normalize: bool = True
    """The scores of the chosen experts are divided by their sum."""
    scaling_factor: Positive = 1.0
    """Factor on the weights of the chosen experts."""
    bias: bool = False
    """A bias per expert takes part in choosing experts, but not in their weights."""
    num_groups: Count | None = None
    """Groups of experts, of which only the best group_top_k are chosen from; null: no groups."""
    group_top_k: Count | None = None
    """Groups that a token may use (with num_groups, and needed there)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.top_k > self.num_experts:
            yield "top_k", f"{self.top_k} exceeds num_experts = {self.num_experts}"
        if self.bias and self.score != "sigmoid":
            yield "bias", f"true with score {self.score}; Megatron has it with sigmoid only"
        if (self.num_groups is None) != (self.group_top_k is None):
            yield "num_groups", "num_groups and group_top_k are given together or not at all"
        elif self.num_groups is not None and self.num_experts % self.num_groups:
            yield "num_groups", f"{self.num_groups} does not divide num_experts = {self.num_experts}"


class MLA(Section):
    """Multi-head latent attention: keys and values are projected up from a small shared vector"""

    q_lora_rank: Count | None = None
    """Width of the queries' latent vector; null: queries are projected directly."""
    kv_lora_rank: Count
    """Width of the latent vector of keys and values."""
    qk_head_dim: Count
    """Channels of a head's queries and keys that are not rotated."""
    qk_rope_head_dim: Count
    """Channels that are rotated; the keys' are shared by all heads."""
    v_head_dim: Count
    """Channels of a head's values."""


class Model(Section):
    """Architecture of a student that starts from random weights"""

    num_layers: Count
    """Transformer layers."""
    hidden_size: Count
    """Width of the residual stream, in channels."""
    ffn_hidden_size: Count
    """Inner width of the feed-forward block, in channels."""
    num_attention_heads: Count
    """Query heads."""
    num_query_groups: Count | None = None
    """Key/value heads; null: num_attention_heads."""
    kv_channels: Count | None = None
    """Channels of one attention head; null: hidden_size / num_attention_heads."""
    max_sequence_length: Count
    """Longest sequence the model takes, in tokens."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Norm before attention, before the feed-forward block, and before the head."""
    norm_zero_centered: bool = False
    """Norm weights are stored as gain - 1, so that weight decay pulls the gain to 1."""
    pre_norms: bool = True
    """Norms before attention and before the feed-forward block; without them post_norms are needed."""
    post_norms: bool = False
    """Further norms at the end of attention and of the feed-forward block, before the residual sum."""
    qk_norm: bool = False
    """Norm of every head's queries and keys, before the rotation."""
    qk_norm_over: Literal["head", "all_heads"] = "head"
    """What one such norm is taken over: one head's channels, or those of all heads together (with qk_norm)."""
    activation: Literal["swiglu", "geglu", "geglu_tanh", "reglu", "gelu", "gelu_tanh", "relu", "squared_relu"] = (
        "swiglu"
    )
    """Activation of the feed-forward block; names in -glu(_tanh) have a gate. `_tanh` is GELU's approximation by tanh,
    without it the exact one by erf."""
    parallel_residual: bool = False
    """Attention and feed-forward block both read the layer's input, and their outputs are summed."""
    shared_norm: bool = False
    """Both read it through one norm instead of one each (with parallel_residual)."""
    position_embedding: Literal["rope", "learned_absolute"] = "rope"
    """How a token knows its position."""
    rotary_base: Positive = 10000.0
    """Base of the rotary frequencies (rope only)."""
    rotary_percent: Share = 1.0
    """Share of a head's channels that are rotated (rope only)."""
    rope_scaling: RopeScaling | None = None
    """How the rotary frequencies are stretched for long sequences; null: they are not (rope only)."""
    no_rope_layers: list[CountOrZero] = Field([])
    """Layers, counted from 0, that do not rotate at all (rope only)."""
    sliding_window: Count | None = None
    """Tokens, itself included, that a token attends to; null: all before it."""
    sliding_window_layers: list[CountOrZero] | None = None
    """Layers, counted from 0, that have the sliding window; null: all."""
    sliding_window_rotary_base: Positive | None = None
    """Base of the rotary frequencies, without rope_scaling, in the layers with a sliding window; null: rotary_base."""
    softmax_scale: Positive | None = None
    """Factor on attention scores; null: 1 / sqrt(channels of a query)."""
    attention_softcap: Positive | None = None
    """Scores s become softcap * tanh(s / softcap); null: they do not."""
    logit_softcap: Positive | None = None
    """The same for the logits of the head."""
    embedding_multiplier: Positive = 1.0
    """Factor on the embeddings, rounded to the weights' type."""
    residual_multiplier: Positive = 1.0
    """Factor on what attention and the feed-forward block add to the residual stream."""
    logit_divisor: Positive = 1.0
    """What the final hidden states are divided by before the head."""
    norm_epsilon: Positive = 1e-5
    """Added to the variance in a norm."""
    add_bias_linear: bool = False
    """Biases in all linear layers."""
    add_qkv_bias: bool = False
    """Biases in the query, key and value projections alone."""
    tie_embeddings: bool = True
    """The head uses the embedding's weight."""
    hidden_dropout: BelowOne = 0.0
    """Probability of dropout on the residual stream."""
    attention_dropout: BelowOne = 0.0
    """Probability of dropout on attention weights."""
    init_std: Positive = 0.02
    """Standard deviation of the initial weights."""
    vocab_size: Count | None = None
    """Real vocabulary, in ids; null: the tokenizer's."""
    moe: MoE | None = None
    """Experts in place of the feed-forward block; null: none."""
    mla: MLA | None = None
    """Multi-head latent attention; null: ordinary attention."""

    def problems(self) -> Iterator[tuple[str, str]]:
        heads, groups = self.num_attention_heads, self.num_query_groups
        if words := excess("LAYERS", self.num_layers):
            yield "num_layers", f"{words}; {advice('LAYERS')}"
            return
        if self.moe and (words := excess("EXPERTS", self.num_layers * self.moe.num_experts)):
            yield "moe.num_experts", f"{words}; {advice('EXPERTS')}"
        if groups is not None and heads % groups:
            yield "num_query_groups", f"{groups} does not divide num_attention_heads = {heads}"
        if self.mla is not None:
            if self.mla.qk_rope_head_dim % 2:
                yield "mla.qk_rope_head_dim", f"{self.mla.qk_rope_head_dim} is odd; channels are rotated in pairs"
        elif self.kv_channels is None and self.hidden_size % heads:
            yield (
                "hidden_size",
                f"{self.hidden_size} is not divisible by num_attention_heads = {heads}, and kv_channels is not given",
            )
        elif self.position_embedding == "rope":
            channels = self.kv_channels or self.hidden_size // heads
            rotated = int(channels * self.rotary_percent)
            if rotated < 2 or rotated % 2:
                yield (
                    "rotary_percent",
                    f"rotates {rotated} of {channels} channels of a head, expected an even number of at least 2",
                )
        for key in ("no_rope_layers", "sliding_window_layers"):
            if outside := [i for i in getattr(self, key) or [] if i >= self.num_layers]:
                yield key, f"layers {outside} do not exist; there are {self.num_layers}, counted from 0"
        if not self.pre_norms and not self.post_norms:
            yield "pre_norms", "false, and post_norms too; a layer needs one of them"
        if self.qk_norm_over == "all_heads" and not self.qk_norm:
            yield "qk_norm_over", "all_heads without qk_norm"
        if self.shared_norm and not (self.parallel_residual and self.pre_norms):
            yield "shared_norm", "true without parallel_residual and pre_norms; there are then no two norms to share"
        if self.sliding_window is None and (self.sliding_window_layers or self.sliding_window_rotary_base):
            yield "sliding_window", "missing; sliding_window_layers or sliding_window_rotary_base is given"
        if self.moe is not None and self.moe.layers and max(self.moe.layers) >= self.num_layers:
            yield "moe.layers", f"{max(self.moe.layers)} does not exist; there are {self.num_layers}, counted from 0"
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn" and self.mla is None:
            yield "rope_scaling.kind", "yarn without mla; expected linear or llama3"

    @property
    def head_channels(self) -> int:
        """Channels of one attention head's queries."""
        if self.mla is not None:
            return self.mla.qk_head_dim + self.mla.qk_rope_head_dim
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block's first layer is two: gate and up."""
        return "glu" in self.activation

    def has_experts(self, layer: int) -> bool:
        return self.moe is not None and (self.moe.layers is None or layer in self.moe.layers)

    def has_window(self, layer: int) -> bool:
        windowed = self.sliding_window_layers
        return self.sliding_window is not None and (windowed is None or layer in windowed)
