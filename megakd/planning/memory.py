"""Bytes of tensors that a rank holds while it trains, by what they are for.

Static: weights, gradients, optimizer state, the teacher's weights. Transient: activations of the student's
micro-batches in flight with the loss of one, or what the teacher's forward pass needs: they never exist together.

The terms of a layer are what autograd keeps of Megatron's local layers with attention that keeps no scores, counted
tensor by tensor on a CPU (tests/planning/test_memory.py compares whole steps). Transformer Engine's layers keep a
little less: they make no copy of the attention's output. What is not counted: the CUDA context, buffers of NCCL and of
libraries, and what the allocator cannot use for being in pieces.

Letters: T tokens of a micro-batch on this rank, h hidden_size, q and k channels of all query heads and query groups, f
ffn_hidden_size, W columns of the vocabulary on this rank, K loss.top_k.
Source of the terms under tensor and sequence parallelism and recomputation: arXiv:2205.05198.
"""

from dataclasses import dataclass, fields

from megakd.config import Config, Model, Parallel
from megakd.planning.gathered import GRADIENT_BYTES, gathered_weights, megatron_buckets
from megakd.planning.parameters import (
    layers_of,
    padded_vocab,
    rank_parameters,
    whole_parameters,
    widths,
)

BYTES = {"bf16": 2, "fp32": 4}
MOMENTS_BYTES = 8  # both of Adam's, in float32
MASTER_BYTES = 4  # of a bf16 model's float32 weights
LESSON_BYTES = 12  # of an entry that a teacher gave: its id in 64 bits and its log-probability
ENTRY_BYTES = 24  # of an entry in the loss: its column in 64 bits, the student's logit, and copies of both for a row


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank; `total` is the most at one time.

    Attributes:
        weights, gradients, optimizer: of the student.
        teacher: the weights of one that runs.
        gathered: of the student's weights cut by FSDP, those that are whole at one time: the ends, and two layers.
        lessons: what the teacher says about the step's micro-batches, or what is read of a cache for a step.
        activations: kept for the backward pass, over the micro-batches in flight.
        working: of the micro-batch under way, whichever is more: its logits, or blocks of them, and what their
            gradients need; or the gradients within a layer's backward pass.
        teacher_pass: what the teacher's forward pass holds at most.
    """

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    gathered: int
    lessons: int
    activations: int
    working: int
    teacher_pass: int

    @property
    def static(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.teacher

    @property
    def total(self) -> int:
        student = self.gathered + self.activations + self.working
        return self.static + self.lessons + max(student, self.teacher_pass)

    def items(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def rank_memory(
    config: Config, student: Model, teacher: Model | None, dp: int, stage: int, device: str = "cuda"
) -> Memory:
    """Of a rank of one pipeline stage.

    Args:
        student, teacher: the models, with their vocab_size; teacher: of one that runs, None without.
        dp: data parallel copies.
        device: on a `cpu` an RMSNorm is several operations, which keep what is between them.
    """
    parallel, train, size = config.parallel, config.train, BYTES[config.train.precision]
    padded = padded_vocab(max(model.vocab_size for model in (student, teacher) if model))
    mine = rank_parameters(student, parallel, padded, stage, config.student.pipeline)
    number = train.global_batch_size // (train.micro_batch_size * dp)
    tokens = train.micro_batch_size * config.data.sequence_length // parallel.cp
    last = stage == parallel.pp - 1
    theirs = pass_bytes = 0
    if teacher:
        of_teacher, their_size = config.teacher_parallel, BYTES[config.teacher_train.precision]
        pipeline = config.teacher.pipeline
        own_head = wider_head(config, teacher, padded, stage)
        theirs = (rank_parameters(teacher, of_teacher, padded, stage, pipeline).total + own_head) * their_size
        pass_bytes = teacher_pass(config, teacher, padded, tokens, their_size, stage)
        if parallel.shards("teacher"):
            theirs //= dp * parallel.cp // config.students_per_teacher
            gathered = gathered_weights(teacher, of_teacher, padded, stage, pipeline)
            pass_bytes += (gathered + own_head) * their_size
    kept = activations(config, student, stage, number) * tokens * size
    if device == "cpu":
        copy = 4 if train.precision == "fp32" else 8  # in float32; of another type the input is copied too
        kept += round(norm_copies(config, student, stage, number) * tokens) * copy
    working = layer_backward(config, student, stage) * tokens * size + largest_weight(student, parallel) * size
    if last:
        working = max(working, head_bytes(config, student, padded, tokens, size))
    cut, weight, gathered = 1, size, 0
    if parallel.shards("student"):  # what is kept is float32, and what an optimizer steps on
        cut, weight = dp * parallel.cp, MASTER_BYTES
        gathered = gathered_weights(student, parallel, padded, stage, config.student.pipeline) * size
        if parallel.fsdp_by == "megatron":  # in the type of the model too
            weight += size
            gathered = megatron_buckets(student, parallel, padded, stage, config.student.pipeline, size)
    return Memory(
        weights=mine.total * weight // cut,
        gradients=mine.total * GRADIENT_BYTES // cut,
        optimizer=mine.total * MOMENTS_BYTES // cut if gathered else optimizer_bytes(config, mine, dp),
        teacher=theirs,
        gathered=gathered,
        lessons=lesson_bytes(config, teacher, tokens, number) if last else 0,
        activations=kept,
        working=working,
        teacher_pass=pass_bytes,
    )


def wider_head(config: Config, teacher: Model, padded: int, stage: int) -> int:
    """Parameters of a head beside a rank's share of it, for a teacher with more tensor parallel ranks: it is cut as the
    student's, and not tied."""
    parallel, students = config.parallel, config.students_per_teacher
    if students == 1 or stage < parallel.pp - 1:
        return 0
    share = padded // config.teacher_parallel.tp
    there = 0 if teacher.tie_embeddings and stage == 0 else share  # counted with the ends
    return (share * students - there) * teacher.hidden_size


def optimizer_bytes(config: Config, mine, dp: int) -> int:
    """Moments, and float32 weights of a bf16 model, cut over the ranks that have the same weights."""
    each = MOMENTS_BYTES + (MASTER_BYTES if config.train.precision == "bf16" else 0)
    if not config.optimizer.distributed:
        return mine.total * each
    parallel, alike = config.parallel, dp * config.parallel.cp
    of_experts = max(alike * parallel.tp // parallel.ep, 1)  # of a stage's ranks, those with the same experts
    return mine.dense * each // alike + mine.experts * each // of_experts


def checkpoint_bytes(config: Config, student: Model) -> int:
    """Tensors of a checkpoint on the disk: weights, float32 weights and moments, with the padded vocabulary."""
    padding = padded_vocab(student.vocab_size) - student.vocab_size
    padding *= student.hidden_size * (1 if student.tie_embeddings else 2)
    each = BYTES[config.train.precision] + MASTER_BYTES + MOMENTS_BYTES
    return (whole_parameters(student) + padding) * each


def lesson_bytes(config: Config, teacher: Model | None, tokens: int, micro_batches: int) -> int:
    """Of a step: the teacher's entries, or, for its whole distribution, what its head is given, in shares over tp.

    Of recorded hidden states 0: how wide they are, the config does not say.
    """
    if config.teacher is None or (config.loss.targets == "whole" and teacher is None):
        return 0
    if config.loss.targets == "whole":
        one, tp = tokens * teacher.hidden_size * BYTES[config.teacher_train.precision], config.parallel.tp
        return one if micro_batches == 1 else one * micro_batches // tp + (one if tp > 1 else 0)
    return tokens * micro_batches * entries_of(config) * LESSON_BYTES


def entries_of(config: Config) -> int:
    """That a teacher gives for a token."""
    return config.loss.draws if config.loss.targets == "sampled" else config.loss.top_k


def activations(config: Config, model: Model, stage: int, micro_batches: int) -> int:
    """Elements a token of one micro-batch that the backward pass needs, times the micro-batches in flight."""
    parallel, h = config.parallel, model.hidden_size
    along = parallel.tp if parallel.sp else 1
    layers = layers_of(model, parallel, stage, config.student.pipeline)
    each = [layer_elements(model, layer, parallel, config.train.recompute) for layer in layers]
    extra = 0
    if config.train.recompute == "full":
        extra = max(layer_elements(model, layer, parallel, "none") for layer in layers)
        each = [h // along] * len(layers)
    return round((sum(each) + h // along) * in_flight(parallel, stage, micro_batches)) + extra


def in_flight(parallel: Parallel, stage: int, micro_batches: int) -> float:
    """Micro-batches of which a stage keeps activations at one time."""
    if parallel.vpp == 1:
        return min(parallel.pp - stage, micro_batches)
    # In parts of a virtual stage each: those of Megatron's warm-up, and the one under way.
    ahead = (parallel.pp - stage - 1) * 2 + (parallel.vpp - 1) * parallel.pp + 1
    return min(ahead / parallel.vpp, micro_batches)


def norm_copies(config: Config, model: Model, stage: int, micro_batches: int) -> float:
    """Elements a token that RMSNorms keep beside input and output where they are no single operation."""
    if model.normalization != "RMSNorm" or config.train.recompute == "full":
        return 0
    parallel = config.parallel
    along = parallel.tp if parallel.sp else 1
    norms = 2 * model.pre_norms + 2 * model.post_norms
    each = norms * model.hidden_size // along
    if model.qk_norm and model.mla is None:
        each += sum(widths(model)) // parallel.tp
    number = len(layers_of(model, parallel, stage, config.student.pipeline))
    return each * number * in_flight(parallel, stage, micro_batches) + model.hidden_size // along


def layer_backward(config: Config, model: Model, stage: int) -> int:
    """Elements a token that the gradients within a layer take: of the stream, and of what the block is made of."""
    parallel = config.parallel
    along = parallel.tp if parallel.sp else 1
    inner = model.ffn_hidden_size // parallel.tp
    if model.has_experts(layers_of(model, parallel, stage, config.student.pipeline)[-1]):
        inner = model.moe.top_k * model.moe.ffn_hidden_size // (parallel.tp if parallel.ep == 1 else 1)
    return 2 * model.hidden_size // along + (4 if model.gated else 2) * inner


def largest_weight(model: Model, parallel: Parallel) -> int:
    """Elements of a layer's largest weight, whose gradient exists before it is added up."""
    return model.ffn_hidden_size * (2 if model.gated else 1) * model.hidden_size // parallel.tp


def layer_elements(model: Model, layer: int, parallel: Parallel, recompute: str) -> int:
    """Elements a token that autograd keeps of a layer."""
    along = parallel.tp if parallel.sp else 1
    h = model.hidden_size
    stream = (2 + 2 * model.pre_norms + 2 * model.post_norms) * h // along
    attention = attention_elements(model, parallel, selective=recompute == "selective") // parallel.tp
    if not model.has_experts(layer):
        return stream + attention + block_elements(model, model.ffn_hidden_size) // parallel.tp
    return stream + attention + experts_elements(model, parallel)


def attention_elements(model: Model, parallel: Parallel, *, selective: bool) -> int:
    if model.mla is None:
        q, k = widths(model)
        kept = q + 2 * k  # what the projection gives, values with it
        if model.position_embedding == "rope":
            kept += q + k
        if model.qk_norm:
            kept += q + k
        v = q
    else:
        mla, heads = model.mla, model.num_attention_heads
        q, v = heads * model.head_channels, heads * mla.v_head_dim
        latent = (mla.q_lora_rank or 0) + mla.kv_lora_rank
        kept = 2 * latent * parallel.tp + mla.qk_rope_head_dim * parallel.tp
        kept += 2 * q + q + heads * (mla.qk_head_dim + mla.v_head_dim)
    if parallel.cp > 1 and model.mla is None:
        kept += 2 * widths(model)[1] * parallel.cp  # keys and values of the whole sequence
    return kept + (1 if selective else 2) * v  # as attention gives it, and in the projection's order


def block_elements(model: Model, inner: int) -> int:
    """Of a feed-forward block: both halves of what is gated, the gate's value, a shifted copy of the other, and their
    product; without a gate, before and after."""
    if model.gated:
        return 5 * inner
    return (3 if model.activation == "squared_relu" else 2) * inner


def experts_elements(model: Model, parallel: Parallel) -> int:
    """Of a layer with experts whose choices are spread evenly."""
    moe, h = model.moe, model.hidden_size
    inner = moe.top_k * block_elements(model, moe.ffn_hidden_size)
    if parallel.ep == 1:
        inner //= parallel.tp
    along = parallel.tp if parallel.sp else 1
    routed = 2 * moe.top_k * h + (4 * moe.num_experts)
    kept = inner + routed // along
    if moe.shared_ffn_hidden_size:
        kept += block_elements(model, moe.shared_ffn_hidden_size) // parallel.tp + h // along
    return kept


def is_fused(config: Config, model: Model, padded: int, tokens: int, size: int) -> bool:
    """Whether output layer and loss are run together, in blocks of tokens; as megakd.training.head_loss has it."""
    width = padded // config.parallel.tp
    if config.loss.targets == "whole" or model.logit_softcap is not None:
        return True
    return tokens > max(config.loss.logits_memory_budget_bytes // (width * size), 1)


def head_bytes(config: Config, model: Model, padded: int, tokens: int, size: int) -> int:
    """Of one micro-batch in the loss.

    Apart: the final norm's output, the supervised rows, their logits, and in the backward pass the gradients of rows
    and weight. Fused: a block of logits (two with a soft cap), at most as much for products, no weight's gradient.
    """
    h, width = model.hidden_size, padded // config.parallel.tp
    along = config.parallel.tp if config.parallel.sp else 1
    rows = tokens * h * size
    whole = config.teacher is not None and config.loss.targets == "whole"
    entries = tokens * entries_of(config) * ENTRY_BYTES if config.teacher and not whole else 0
    states = rows // along + rows + (rows if along > 1 else 0)
    if whole:  # a block of each model's logits, and as much for products
        return states + rows + 3 * min(config.loss.logits_memory_budget_bytes, tokens * width * size)
    if not is_fused(config, model, padded, tokens, size):
        return states + entries + tokens * width * size + rows + width * h * size
    block = min(config.loss.logits_memory_budget_bytes, tokens * width * size)
    return states + entries + rows + block * (3 if model.logit_softcap is not None else 2)


def teacher_pass(config: Config, teacher: Model, padded: int, tokens: int, size: int, stage: int) -> int:
    """One layer's values, or the head: logits of what fits into the budget, and the rows they are of."""
    parallel = config.teacher_parallel
    layers = layers_of(teacher, parallel, stage, config.teacher.pipeline)
    layer = max(layer_elements(teacher, layer, parallel, "none") for layer in layers) * tokens * size
    if stage < parallel.pp - 1:
        return layer
    width = padded // config.parallel.tp  # the head is cut as the student's
    block = min(config.loss.logits_memory_budget_bytes, tokens * width * size)
    return max(layer, 2 * tokens * teacher.hidden_size * size + block)
