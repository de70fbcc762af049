"""The sections of a run's YAML: every key with its type, range, default, and what it means in which unit.

The docstring under a field is its help: `megakd train --help` prints it. A section that has rules between its own
fields yields what breaks them from `problems()`; rules between sections live in `megakd.config.config`.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from megakd.config.model import Model
from megakd.config.parallel import Pipeline, TeacherParallel
from megakd.config.paths import LocalPath
from megakd.config.section import (
    AboveOne,
    BelowOne,
    Count,
    CountOrZero,
    Duration,
    NotNegative,
    Positive,
    Section,
    Seed,
    Text,
)


class Run(Section):
    """Where the run lives, and how it starts and stops"""

    dir: LocalPath
    """Folder of the run: resolved config, metrics and checkpoints. It is made when it does not exist."""
    seed: Seed = 1234
    """Seed of initial weights, dropout and the order of samples."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`cuda` (NCCL), `cpu` (gloo), or `auto`: cuda when torch sees a GPU, else cpu."""
    resume: Literal["auto", "never", "required", "newest_only"] = "auto"
    """Of train: `auto` continues from the folder's last checkpoint if there is one, and sets it aside for the one
    before it if it is damaged; `newest_only` refuses a damaged one; `never` refuses a folder that has a checkpoint;
    `required` refuses a folder that has none. A recording always continues."""
    allow_change: list[Text] = Field([])
    """Keys or sections (`train.steps`, `optimizer`) that may differ from the run folder's saved config on resume."""
    timeout_seconds: Count = 1800
    """Seconds that ranks wait for each other (a slow disk, data tokenized at the start) before the run is given up."""
    watchdog_seconds: Positive | None = None
    """Seconds that a step or a validation batch may take before the launch counts as stuck: every rank writes its
    stacks into `stuck` in the run folder, the rank that the others wait for is named, and the launch ends. null: 5
    times the longest seen, and at least 120."""
    stop_after: Count | Duration | None = None
    """Of train: optimizer steps of this launch (200), or a time since its ranks met (3h50m, for a queue's limit), after
    which it writes a checkpoint and stops; null: goes on to the end."""
    record_steps: list[Count] = Field([])
    """Optimizer steps (the first is 1) of which everything is kept in `steps` in the run folder: ids, labels, the
    teacher's targets, the loss of every token, gradient norms, and the weights before it. `megakd replay` computes such
    a step again at another layout, version or device, and says what differs first."""


class Student(Section):
    """The model that learns: from a checkpoint, or new from a `model` section"""

    checkpoint: LocalPath | None = None
    """Folder to start from: a megakd checkpoint, a run folder (its last checkpoint), or a Hugging Face model's folder,
    which is converted once; it brings architecture and tokenizer."""
    model: Model | None = None
    """Architecture to start from random weights."""
    pipeline: Pipeline = Pipeline()

    def problems(self) -> Iterator[tuple[str, str]]:
        if (self.checkpoint is None) == (self.model is None):
            seen = "neither is" if self.model is None else "both are"
            yield "checkpoint", f"{seen} given; expected exactly one of checkpoint and model"


class Teacher(Section):
    """The model that is learnt from; null: the student learns from the data alone"""

    checkpoint: LocalPath | None = None
    """Folder of a megakd checkpoint, a run folder (its last checkpoint), or a Hugging Face model's folder, which is
    converted once. Without a cache the teacher runs live beside the student."""
    cache: LocalPath | list[LocalPath] | None = None
    """Folder of a logit cache: `megakd cache` records the checkpoint into it; training reads it, and the teacher does
    not run. With a checkpoint as well, training checks that the cache was recorded from it. Several: `[path, path]`,
    such as one for each domain's teacher; every sample is taken from the one cache that holds it."""
    cache_checks: Literal["always", "sampled"] = "always"
    """Which rows of the cache have their checksum compared when they are read: every one, or one in 16."""
    allow_weak: bool = False
    """Go on although the teacher predicts the first batch no better than counting its tokens does, or worse than the
    student before its first update."""
    precision: Literal["bf16", "fp32"] | None = None
    """Type of its weights and activations, where it runs; null: train.precision. Its logits are reduced in float32."""
    pipeline: Pipeline = Pipeline()
    parallel: TeacherParallel | None = None
    offload: bool = False
    """Of train: its weights rest in host memory while the student computes, and are copied to the device for the
    teacher's phase of every step, layer by layer while it runs."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.offload and self.cache is not None:
            yield "offload", "true, but what is in a cache is said without the teacher's weights; expected false"
        if self.cache == []:
            yield "cache", "[]; expected at least one folder, or null"
        if len(set(self.caches)) < len(self.caches):
            yield "cache", f"{self.cache} names one twice"

    @property
    def caches(self) -> list[str]:
        """The folders of `cache`."""
        return self.cache if isinstance(self.cache, list) else [self.cache] if self.cache else []


class NemoChatTokens(Section):
    """The strings that NeMo's chat format puts around turns; the defaults are NeMo's"""

    system_turn_start: str = "\x00"
    """Before the system turn."""
    turn_start: str = "\x11"
    """Before every other turn."""
    label_start: str = "\x12"
    """Before a turn's label."""
    end_of_turn: str = "\n"
    """After a turn."""
    end_of_name: str = "\n"
    """After the speaker's name, and after a label."""


class Data(Section):
    """What is read. A raw file is tokenized once, into a folder beside it"""

    train: LocalPath | list[LocalPath | Positive] | None = None
    """Training data: a JSONL, JSON, CSV, Parquet, Arrow or text file, a folder or pattern (`a/*.jsonl`) of them, a
    folder saved by Hugging Face datasets, or the prefix of a token file (`megakd prepare`, or Megatron's .bin/.idx).
    Several: `[path, path]`, or a blend `[0.7, path, 0.3, path]`. Only where rollouts.fraction is 1 it may be null."""
    validation: LocalPath | list[LocalPath | Positive] | None = None
    """Held-out data, in the same forms (each part is read once, whatever its weight); null: no validation."""
    tokenizer: LocalPath | None = None
    """Tokenizer: a SentencePiece model, a tokenizer.json or its folder, a tiktoken file, a checkpoint that carries one;
    null: the student checkpoint's."""
    sequence_length: Count
    """Tokens of one sample; longer ones are cut, and left out if no supervised token remains."""
    format: Literal["auto", "text", "prompt_response", "alpaca", "nemo_chat", "messages", "ids"] = "auto"
    """What a record is: `{"text"}`, `{"input", "output"}`, Alpaca's `{"instruction", "input", "output"}`, NeMo's
    `{"system", "conversations", "mask", "type"}`, or a conversation for a chat template: `{"messages": [{"role",
    "content"}]}`, ShareGPT's, TRL's `{"prompt", "completion"}` with turns, and pairs; or the token ids that `megakd
    generate` wrote, `{"prompt_ids", "completion_ids"}`; auto: what the keys of the first record show."""
    columns: dict[Text, Text] = Field({})
    """Keys of the records where they differ: `{input: question, output: answer}`."""
    template: Text = "{input} {output}"
    """Text of a prompt_response or alpaca sample. Ends with {output}; other names in braces are keys of the record; of
    alpaca {input} is the instruction with its input, unless {instruction} is there too."""
    chat_template: Text | None = None
    """Jinja template of a messages sample, or a file with one; null: the tokenizer's own."""
    chat_template_kwargs: dict[Text, Any] = Field({})
    """What else the chat template sees, such as `{enable_thinking: false}`."""
    chat_tokens: NemoChatTokens = Field(default_factory=NemoChatTokens)
    """Strings around the turns of a nemo_chat sample."""
    answer_only_loss: bool = True
    """Learn from the output or the assistant's turns only; false: from every token of a sample."""
    add_bos: bool = False
    """Put the tokenizer's bos before a text or prompt_response sample."""
    add_eos: bool = True
    """Put the tokenizer's eos after a text or prompt_response sample."""
    weights_of: Literal["samples", "tokens"] = "samples"
    """What the weights of a blend are shares of: of all samples, or of all tokens (a part's samples count at their mean
    length)."""
    truncation: Literal["end", "left", "right"] = "end"
    """Where a sample that is too long is cut: at its end; or, of prompt_response and alpaca, left or right in the text
    of truncation_field, as far as that helps."""
    truncation_field: Text = "input"
    """Name in braces in the template whose text is shortened by truncation left and right."""
    packing: bool = False
    """Several samples in one sequence of training data, without attention between them. Running text is not packed."""
    on_error: Literal["raise", "skip"] = "raise"
    """Records that cannot be used: name them and stop, or leave them out and count them."""
    strict: bool = False
    """Refuse a record with text that its format or template does not use; false: such keys are named once."""
    index_dir: LocalPath | None = None
    """Folder for the tokens of raw files; null: `PATH.megakd` beside each."""
    verify: Literal["always", "sampled", "never"] = "always"
    """Which chunks (of 4 MiB) of the token files are compared with their digests when a run starts, by the ranks of
    each machine together: every one, one in 16, or none."""
    workers: Count | None = None
    """Processes that tokenize; null: one for each processor."""

    def problems(self) -> Iterator[tuple[str, str]]:
        for key, source in (("train", self.train), ("validation", self.validation)):
            if isinstance(source, list):
                kinds = [isinstance(item, str) for item in source]
                if not kinds or not (all(kinds) or kinds == [False, True] * (len(kinds) // 2)):
                    yield key, f"{source}; expected [path, path, ...] or [weight, path, weight, path, ...]"
        if self.weights_of == "tokens" and all(isinstance(item, str) for item in self.train or ()):
            yield "weights_of", f"tokens, but data.train = {self.train} has no weights"


class Train(Section):
    """How long and in what batches"""

    steps: Count | None = None
    """Optimizer steps of the whole run. Exactly one of steps and epochs is given."""
    epochs: Positive | None = None
    """Passes over the training data."""
    micro_batch_size: Count = 1
    """Samples of one forward pass on one data parallel rank."""
    global_batch_size: Count
    """Samples of one optimizer step, over all ranks."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations; the optimizer keeps fp32 weights either way."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, those of attention, or whole layers."""
    spike_factor: AboveOne | None = None
    """A loss above this many times the median of the last 64 steps is a spike, which breaks the batch as a loss that
    is not finite does; null: only the latter. Samples and losses of such a batch are kept in `broken`."""
    max_skipped_steps: CountOrZero = 0
    """Batches that break and are left out before the run stops with an error; 0: the first one stops it."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if (self.steps is None) == (self.epochs is None):
            seen = "neither is" if self.steps is None else "both are"
            yield "steps", f"{seen} given; expected exactly one of steps and epochs"
        if self.global_batch_size % self.micro_batch_size:
            yield (
                "global_batch_size",
                f"{self.global_batch_size} is not divisible by micro_batch_size = {self.micro_batch_size}",
            )


class Optimizer(Section):
    """AdamW and gradient clipping"""

    lr: Positive
    """Peak learning rate."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end of the decay."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay, times the learning rate; norms and biases have none."""
    beta1: BelowOne = 0.9
    """Decay of the running mean of the gradient."""
    beta2: BelowOne = 0.95
    """Decay of the running mean of its square."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    clip_grad: NotNegative = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    distributed: bool = True
    """Optimizer state is cut over the data parallel ranks."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.min_lr > self.lr:
            yield "min_lr", f"{self.min_lr} is above lr = {self.lr}"


class Schedule(Section):
    """Learning rate over optimizer steps"""

    kind: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Shape after the warm-up; wsd (warm-up, stable, decay) stays at the peak until its last wsd_decay_steps."""
    warmup_steps: CountOrZero = 0
    """Steps of linear growth from 0 to the peak."""
    decay_steps: Count | None = None
    """Step at which min_lr is reached, warm-up included; null: the last step of the run."""
    wsd_decay_steps: Count | None = None
    """Steps of the decay at the end (wsd only, and needed there)."""
    wsd_decay_style: Literal["linear", "cosine", "exponential"] = "linear"
    """Shape of that decay (wsd only)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.kind == "wsd" and self.wsd_decay_steps is None:
            yield "wsd_decay_steps", "missing; kind wsd needs it"
        if self.kind != "wsd" and self.wsd_decay_steps is not None:
            yield "wsd_decay_steps", f"{self.wsd_decay_steps} has no effect with kind {self.kind}; expected null"


class Checkpoint(Section):
    """When checkpoints are written and which are kept"""

    every_steps: Count | None = None
    """Optimizer steps between checkpoints; null: only the last one. A last one is always written."""
    keep_last: Count = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = True
    """Keep the checkpoint with the best validation as well."""
    keep_every: Count | None = None
    """Keep the checkpoints of every so many optimizer steps for good as well: a multiple of every_steps; null: none."""
    asynchronous: bool = False
    """Write in the background while training goes on."""
    verify: Literal["always", "sampled", "never"] = "always"
    """Which chunks (of 4 MiB) of a checkpoint's files have their digests compared when they are read: every one, one in
    16, or none."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.keep_every is not None and self.keep_every % (self.every_steps or self.keep_every + 1):
            yield "keep_every", f"{self.keep_every} is no multiple of every_steps ({self.every_steps or 'null'})"


class Export(Section):
    """The student in another format, once the run is finished"""

    format: Literal["hf", "nemo"] | None = None
    """`hf`: a Hugging Face folder, `huggingface` in the run folder; `nemo`: an archive, `student.nemo` there; null:
    neither. It is written by a process of its own on rank 0's machine, without its GPU; the other ranks wait."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of the run's checkpoints: the last one, or that with the best validation."""
    verify: bool = True
    """Compare the logits of what was written (of `nemo`: its tensors) with the checkpoint's, and keep nothing if they
    differ."""

    def problems(self) -> Iterator[tuple[str, str]]:
        given = {"checkpoint": self.checkpoint, "verify": self.verify}
        for name, value in given.items():
            if self.format is None and value != type(self).model_fields[name].default:
                yield name, f"{str(value).lower()}, but format is null: nothing is exported"
