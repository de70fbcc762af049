"""From a checkpoint and prompts to completions: one on the screen, or a file of them at any layout."""

import contextlib
import dataclasses
import datetime
import logging
import pathlib
import sys
import time
from collections import Counter

import torch.distributed as dist

from megakd.assembly.architectures import check_padding
from megakd.assembly.models import build_model
from megakd.cache.fingerprint import folder_fingerprint
from megakd.checkpoints.folder import Checkpoint
from megakd.config import Data, Parallel, Train
from megakd.converters.direct import open_checkpoint
from megakd.data.formats import SampleFormat
from megakd.data.prompts import Prompt, Prompts, build_prompter, detect_prompts
from megakd.data.records import Problems
from megakd.data.sources import choose_format, data_files, file_digest
from megakd.data.tokenizers.load import load_tokenizer
from megakd.data.tokenizers.tokenizer import Tokenizer
from megakd.errors import ConfigError
from megakd.generation.engine import Engine, Request
from megakd.generation.results import INFO, PartWriter, Results
from megakd.generation.stops import Stops, build_stops
from megakd.generation.work import Work, share
from megakd.kernels.next_tokens import Choice
from megakd.models.gpt import padded_vocab_size
from megakd.models.groups import build_groups
from megakd.progress import progress_bar
from megakd.ranks import Ranks, from_rank_0
from megakd.upload import Target

LOG = logging.getLogger("megakd")
PATIENCE = datetime.timedelta(days=30)  # of models that have finished their share, for the one that has most to write


@dataclasses.dataclass(frozen=True)
class Options:
    """What is to be generated, and how.

    Attributes:
        checkpoint: checkpoint, run or Hugging Face folder.
        choice: how tokens are chosen.
        max_new_tokens: of a completion.
        completions: of each prompt.
        stop_texts, stop_tokens, ignore_eos: as of `build_stops`.
        seed: of draws.
        slots: sequences under way at once in one model.
        tp, pp: layout of one model; the other ranks are more of them.
        precision: of weights and activations; None: bf16 on CUDA, else fp32.
    """

    checkpoint: str
    choice: Choice
    max_new_tokens: int
    completions: int = 1
    stop_texts: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    ignore_eos: bool = False
    seed: int = 1234
    slots: int = 16
    tp: int = 1
    pp: int = 1
    precision: str | None = None


class Writer:
    """A model that is there to write.

    Args:
        options: of the user.
        ranks: of the launch.

    Attributes:
        checkpoint, tokenizer, stops: of it.
        groups: process groups; `groups.dp` counts the models.
    Raises:
        ConfigError, CheckpointError: the ranks do not fit, there is no tokenizer, a stop is unknown.
    """

    def __init__(self, options: Options, ranks: Ranks):
        self.options, self.ranks = options, ranks
        size = options.tp * options.pp
        if ranks.world_size % size:
            raise ConfigError(
                f"--tp {options.tp} x --pp {options.pp} are {size} ranks, {ranks.world_size} were started, no multiple",
                hint=f"torchrun --nproc-per-node {size} -m megakd generate ...",
            )
        self.checkpoint: Checkpoint = from_rank_0(
            lambda: open_checkpoint(options.checkpoint, progress=sys.stderr.isatty())
        )
        if self.checkpoint.tokenizer_path is None:
            raise ConfigError(
                f"{self.checkpoint.path} carries no tokenizer", hint="use a checkpoint that megakd has saved"
            )
        self.tokenizer: Tokenizer = load_tokenizer(self.checkpoint.tokenizer_path)
        self.stops: Stops = build_stops(
            self.tokenizer, options.stop_tokens, options.stop_texts, ignore_eos=options.ignore_eos
        )
        self.precision = options.precision or ("bf16" if ranks.device.type == "cuda" else "fp32")
        if self.most_prompt_tokens < 1:
            raise ConfigError(
                f"--max-new-tokens {options.max_new_tokens} leaves no room for a prompt in the model's "
                f"{self.checkpoint.model.max_sequence_length} positions",
                hint=f"at most --max-new-tokens {self.checkpoint.model.max_sequence_length - 1}",
            )
        self.groups = build_groups(options.tp, options.pp, seed=0)

    @property
    def most_prompt_tokens(self) -> int:
        return self.checkpoint.model.max_sequence_length - self.options.max_new_tokens

    def engine(self) -> Engine:
        """The model with its weights, which takes a while."""
        options, model = self.options, self.checkpoint.model
        padded_size = padded_vocab_size(model.vocab_size)
        check_padding(padded_size, options.tp)
        gpt = build_model(
            model, self.checkpoint, Parallel(tp=options.tp, pp=options.pp),
            Train(steps=1, global_batch_size=1, precision=self.precision), self.groups,
            vocab_size=self.tokenizer.vocab_size, padded_size=padded_size, device=self.ranks.device, local=True,
        )  # fmt: skip
        return Engine(
            gpt, self.groups, self.ranks.device, options.choice, self.stops,
            max_new_tokens=options.max_new_tokens, slots=options.slots, seed=options.seed,
        )  # fmt: skip


def complete(options: Options, text: str, ranks: Ranks, *, raw: bool) -> list[str]:
    """The completions of one prompt; where it was not a turn of a conversation, with the prompt before them.

    Args:
        raw: the prompt is a text to go on from; else a user's turn, where the tokenizer has a chat template.
    Raises:
        ConfigError: the prompt has no token, or does not fit.
    """
    writer = Writer(options, ranks)
    tokenizer = writer.tokenizer
    chat = tokenizer.chat_template is not None and not raw
    if chat:
        form, record = SampleFormat("messages"), {"messages": [{"role": "user", "content": text}]}
        prompt = build_prompter(form, tokenizer)(record)
    else:
        prompt = Prompt(text, tokenizer.encode(text))
    if not prompt.ids:
        raise ConfigError("the prompt has no tokens", hint="--prompt TEXT")
    if len(prompt.ids) > writer.most_prompt_tokens:
        most = writer.checkpoint.model.max_sequence_length
        raise ConfigError(
            f"the prompt's {len(prompt.ids)} tokens and --max-new-tokens {options.max_new_tokens} exceed the model's "
            f"{most} positions",
            hint=f"at most --max-new-tokens {max(most - len(prompt.ids), 0)}, or a shorter prompt",
        )
    requests = [Request(0, number, tuple(prompt.ids)) for number in range(options.completions)]
    done = [sequence for finished in writer.engine().run(requests) for sequence in finished]
    done.sort(key=lambda sequence: sequence.request.completion)
    if chat:
        return [sequence.text for sequence in done]
    start = len(tokenizer.decode(prompt.ids))
    return [text + cut(tokenizer.decode([*prompt.ids, *sequence.ids])[start:], sequence) for sequence in done]


def cut(text: str, sequence) -> str:
    """A text without the stop text that has ended it."""
    return text[: text.find(sequence.stop)] if isinstance(sequence.stop, str) and sequence.stop in text else text


def write_file(
    options: Options,
    data: Data,
    output: pathlib.Path,
    ranks: Ranks,
    *,
    shard: tuple[int, int],
    limit: int | None,
    upload: str | None = None,
) -> None:
    """Completions of the prompts of `data.train` into a file (megakd.generation.results), from where they were.

    Args:
        data: the section that says what records mean; its lengths and masks are of no account.
        shard: its number, from 0, and how many there are.
        limit: records of the input that are used; None: all.
        upload: an address that the finished file is sent to (megakd.upload).
    Raises:
        ConfigError, DataError, CheckpointError: on every rank, what was finished is kept.
    """
    if upload:
        from_rank_0(lambda: Target(upload, output, INFO).check())
    writer = Writer(options, ranks)
    files = tuple(data_files(data.train))
    name = from_rank_0(lambda: detect_prompts(files, data.columns) if data.format == "auto" else data.format)
    form = choose_format(data.model_copy(update={"format": name}), files)
    prompts = Prompts(files, form, writer.tokenizer, limit)
    total, problems = from_rank_0(lambda: prompts.check(data.on_error))
    settings = from_rank_0(lambda: describe_settings(writer, prompts, shard, data.on_error))
    results = Results(output, settings, options.completions)
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    if from_rank_0(results.finished):
        LOG.info("%s is there already, made with the same settings", output)
    else:
        with writing_together(results) as done:
            dp = writer.groups.dp
            numbers = share(total, shard, dp.rank(), dp.size())
            work = Work(prompts, numbers, options.completions, set(done.tolist()), writer.most_prompt_tokens)
            counts = run(writer, work, results, shown=ranks.is_main)
            everyone: list = [None] * ranks.world_size
            dist.all_gather_object(everyone, counts if is_first_of_model(writer.groups) else None, group=patient)
            if ranks.is_main:
                total_of = sum((c for c in everyone if c), Counter())
                total_of["records that cannot be used"] += problems.count
                report(results, total_of, problems)
            dist.barrier(patient)
    if upload:
        from_rank_0(lambda: send(Target(upload, output, INFO)), patient)


def send(target: Target) -> None:
    if target.upload():
        LOG.info("%s and its %s are at %s", target.file, INFO, target.address)
    else:
        LOG.info("%s is there already", target.address)


@contextlib.contextmanager
def writing_together(results: Results):
    """`Results.writing` on rank 0; every rank gets what it yields, or its error.

    Collectives: one broadcast.
    """
    with contextlib.ExitStack() as stack:
        yield from_rank_0(lambda: stack.enter_context(results.writing()))


def is_first_of_model(groups) -> bool:
    """Whether this rank speaks for its model."""
    return groups.tp.rank() == 0 and groups.pp.rank() == 0


def run(writer: Writer, work: Work, results: Results, *, shown: bool) -> Counter:
    """Write what is left of one model's work; counts of what was written and of prompts that were skipped."""
    total = len(work.numbers) * work.completions
    done = sum(number // work.completions in work.numbers for number in work.done)
    counts, started = Counter(), time.perf_counter()
    with (
        PartWriter(results, f"{writer.groups.dp.rank():05d}", writer.tokenizer.fingerprint) as part,
        progress_bar(total, "generating", start=done, shown=shown) as bar,
    ):
        if done == total:
            return counts
        for finished in writer.engine().run(work.requests()):
            for sequence in finished:
                text = work.text_of(sequence.request.prompt)
                if is_first_of_model(writer.groups):
                    part.add(sequence, text)
                counts["new tokens"] += len(sequence.ids)
                counts[f"ended by {sequence.reason}"] += 1
            if finished and not bar.disable:
                rate = counts["new tokens"] * writer.groups.dp.size() / (time.perf_counter() - started)
                bar.set_postfix_str(f" {rate:,.0f} tok/s", refresh=False)
                bar.update(len(finished))
    return counts + work.skipped


def describe_settings(writer: Writer, prompts: Prompts, shard: tuple[int, int], on_error: str) -> dict:
    """What the content of the file depends on, beside rounding."""
    options = writer.options
    return {
        "checkpoint": folder_fingerprint(writer.checkpoint.path),
        "tokenizer": writer.tokenizer.fingerprint,
        "input": [file_digest(file) for file in prompts.files],
        "format": prompts.sample_format.relevant(writer.tokenizer),
        "on_error": on_error,
        "limit": prompts.limit,
        "shard": list(shard),
        "completions": options.completions,
        "choice": dataclasses.asdict(options.choice),
        "max_new_tokens": options.max_new_tokens,
        "stop_ids": sorted(writer.stops.ids),
        "stop_texts": list(writer.stops.texts),
        "seed": options.seed,
        "precision": writer.precision,
    }


def report(results: Results, counts: Counter, problems: Problems) -> None:
    """Put the file together and say what is in it, and what is not."""
    results.finish({"counts": dict(counts)})
    LOG.info("%s: %s", results.path, ", ".join(f"{count:,} {name}" for name, count in counts.items() if count))
    if problems.count:
        LOG.warning("left out %d records that cannot be used:\n%s", problems.count, problems)
