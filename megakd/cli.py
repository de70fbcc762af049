"""The command line: a verb is a function of one module, imported when it is chosen.

    megakd VERB ...                                              one process
    torchrun --nproc-per-node N -m megakd VERB CONFIG.yaml ...   N ranks

A run (`CONFIG.yaml [key=value ...]`) gets its help from the config schema; a tool with flags prints its own.
No help text needs torch, megatron or transformers.
"""

import difflib
import importlib
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass

import megakd
from megakd.errors import MegakdError


@dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        target: "module:function"; the function takes the arguments after the verb and returns an exit code or None.
        summary: one line for `megakd --help`.
        is_run: takes `CONFIG.yaml [key=value ...]`; else flags, parsed (with --help) by the target.
        more: of a run, what its own --help says beside usage and keys.
    """

    target: str
    summary: str
    is_run: bool
    more: str = ""


EVALUATE = """\
The student is the last checkpoint of run.dir, else student.checkpoint; the data are eval.samples
samples of data.validation. A table is printed, and a line of JSON appended to evaluations.jsonl in
run.dir. Averages are over supervised tokens; logarithms are natural.

  --model PATH     judge this checkpoint, run or Hugging Face folder instead; may be repeated, for a
                   table of several, of which nothing is appended
  --json           print a line of JSON for each model in place of the table
  --reliability FILE.png   draw accuracy over confidence, a line for each model
  --tasks NAME,NAME        EleutherAI's lm-eval tasks instead, on our own engine at this layout
                   (needs megakd[eval]); --task-folder FOLDER has further ones as YAML,
                   --task-limit N takes the first N documents of each

  ce, perplexity   cross-entropy with the data's next token (nats), and its exponential
  bits_per_byte    of the data's text, special tokens at no bytes
  accuracy         share of tokens whose most likely next token is the data's
  ece              calibration error: mean distance of confidence from accuracy, in 15 bins
  calibration      those bins: tokens in each, sum of their confidence, how many are right
  loss             what training minimises: ce_weight * ce + kd_weight * temperature^2 * kd

With a teacher, live or from a recording:

  kd               divergence of the loss section (nats); the exact one where loss.top_k is the
                   vocabulary
  teacher_ce       the teacher's own cross-entropy (nats)
  agreement        share of tokens where student and teacher find the same token most likely
  teacher_mass, student_mass   probability that each gives to the teacher's top_k tokens
  NAME/kd, /ce, /teacher_ce, /agreement, /tokens   of several teachers, over the tokens NAME teaches

With a live teacher or recorded hidden states, over the whole vocabulary at temperature 1:

  forward_kl, reverse_kl   KL(teacher, student) and KL(student, teacher) (nats)
  top5_agreement   share of the teacher's five most likely tokens that are among the student's"""
PRUNE = """\
teacher.checkpoint is cut as the prune section asks, and student.checkpoint is the folder that is
written: `megakd train` with the same config then distils it. Layers may be named; all else is
chosen by what it does over the first prune.samples samples of data.train. megakd.json of the folder
says what was kept, and every importance.

  --dry-run        print the table of sizes and parameters, and nothing else; no ranks are needed"""
VERBS = {
    "train": Verb("megakd.runs.train:main", "train a student, from a teacher or plainly on data", True),
    "evaluate": Verb(
        "megakd.runs.evaluate:main", "measure a student on held-out data, against its teacher", True, EVALUATE
    ),
    "cache": Verb("megakd.runs.cache:main", "record a teacher's logits; look into, check and join caches", False),
    "prune": Verb("megakd.runs.prune:main", "cut a smaller student out of a teacher, to be distilled", True, PRUNE),
    "generate": Verb("megakd.runs.generate:main", "a model writes: one answer, or a file of completions", False),
    "convert": Verb("megakd.runs.convert:main", "Hugging Face checkpoints to megakd and back, verified", False),
    "check": Verb("megakd.runs.check:main", "what of a checkpoint is whole; what is installed here (--env)", False),
    "prepare": Verb(
        "megakd.runs.prepare:main", "train a tokenizer; records or text into token files; look at samples", False
    ),
    "replay": Verb("megakd.runs.replay:main", "compute a recorded step again; what differs first", False),
    "report": Verb("megakd.runs.report:main", "one HTML page that shows and compares runs", False),
}
GRACE_SECONDS = 2.0
WIDTH = 100
HELP_FLAGS = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code: 0, 1 for an explained error, 2 for wrong usage, 130 for Ctrl-C,
    141 for a help text that nobody reads to its end.

    Any other exception leaves with its traceback: it is a bug, or something that only the traceback explains.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(format_help(), file=sys.stderr)
        return 2
    name, rest = arguments[0], arguments[1:]
    if name in HELP_FLAGS:
        return show(format_help())
    if name == "--version":
        print(f"megakd {megakd.__version__}")
        return 0
    if name not in VERBS:
        close = difflib.get_close_matches(name, VERBS, n=1)
        print(f"megakd: no verb `{name}`" + (f"; did you mean `{close[0]}`?" if close else ""), file=sys.stderr)
        print(f"hint: one of {', '.join(VERBS)}; `megakd --help` explains them", file=sys.stderr)
        return 2
    verb = VERBS[name]
    if verb.is_run and any(flag in rest for flag in HELP_FLAGS):
        return show(format_run_help(name, verb))
    try:
        return load_target(verb)(rest) or 0
    except MegakdError as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        print(f"megakd {name}: interrupted; what was finished before is kept", file=sys.stderr)
        return 130


def show(text: str) -> int:
    """Prints a help text; 141 where nobody reads it to its end, as in `megakd train --help | head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        return 141
    return 0


def load_target(verb: Verb):
    """Imports the verb's module and returns its function."""
    module, _, function = verb.target.partition(":")
    return getattr(importlib.import_module(module), function)


def print_error(error: MegakdError) -> None:
    """One paragraph and its hint on stderr; local ranks other than 0, which mostly say the same, print one line.

    They end a little later, too: torchrun kills the others when the first one ends, and rank 0 has more to say.
    """
    text = f"{type(error).__name__}: {error}"
    others = os.environ.get("LOCAL_RANK", "0") != "0"
    if others:
        text = f"rank {os.environ.get('RANK', '?')}: {text.splitlines()[0]}"
    sys.stderr.write(f"{text}\n")  # in one piece, whatever other ranks write
    if others:
        time.sleep(GRACE_SECONDS)


def format_help() -> str:
    """The text of `megakd --help`."""
    from megakd.config import section_summaries

    lines = [
        megakd.__doc__.splitlines()[0],
        "",
        "usage: megakd VERB ...",
        "       torchrun --nproc-per-node N -m megakd VERB CONFIG.yaml [key=value ...]",
        "",
        "verbs (`megakd VERB --help` says more):",
        *(line for name, verb in VERBS.items() for line in wrapped(name, verb.summary)),
        "",
        "sections of CONFIG.yaml (`megakd train --help` lists every key):",
        *(line for name, summary in section_summaries().items() for line in wrapped(name, summary)),
        "",
        "options:",
        "  -h, --help  this text",
        "  --version   the version",
    ]
    return "\n".join(lines)


def wrapped(name: str, summary: str) -> list[str]:
    """A name and what it is, in lines of at most WIDTH characters."""
    return textwrap.wrap(summary, WIDTH, initial_indent=f"  {name:<10}  ", subsequent_indent=" " * 14)


def format_run_help(name: str, verb: Verb) -> str:
    """The text of `megakd train --help`: usage, then every key of the config."""
    from megakd.config import format_reference

    lines = [
        f"megakd {name}: {verb.summary}",
        "",
        f"usage: megakd {name} CONFIG.yaml [key=value ...]",
        f"       torchrun --nproc-per-node N -m megakd {name} CONFIG.yaml [key=value ...]",
        "",
        *([verb.more, ""] if verb.more else []),
        "Overrides are dotted and in YAML: train.steps=20 teacher.checkpoint=runs/t log.progress=false",
        "The keys, each with its default and type:",
        "",
        format_reference(shutil.get_terminal_size((WIDTH, 24)).columns),
    ]
    return "\n".join(lines)
