"""`megakd check CONFIG.yaml [key=value ...]`: what a run will need on so many GPUs, told on one CPU without ranks."""

import argparse
import json
import re
import shlex

from megakd.config import Config, Model
from megakd.errors import ConfigError
from megakd.planning.flops import step_flops_per_token, tokens_per_second
from megakd.planning.hardware import ACCELERATORS
from megakd.planning.layouts import PLANNED_SHARE, Layout, fitting_layouts, fullest_stage, problems_of
from megakd.planning.memory import BYTES, checkpoint_bytes, is_fused
from megakd.planning.parameters import active_parameters, padded_vocab, rank_parameters, whole_parameters
from megakd.planning.traffic import step_traffic
from megakd.planning.words import large

MFU = 0.35  # of the hardware's arithmetic, where nobody said otherwise
SHOWN = 5  # layouts
LESSONS = {"top_k": "entries", "sampled": "draws", "whole": "the teacher's last hidden states"}
UNITS = {"": 10**9, "GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}


def bytes_of(text: str) -> int:
    """`80GB` or `80GiB` as bytes."""
    parts = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text)
    if not parts or parts[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a size such as 80GB or 80GiB")
    return int(float(parts[1]) * UNITS[parts[2]])


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("of a config")
    group.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    group.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="ranks of one (default: 8)")
    group.add_argument("--gpu", choices=sorted(ACCELERATORS), default="h100", help="whose arithmetic (default: h100)")
    group.add_argument("--gpu-memory", type=bytes_of, metavar="80GB", help="of one GPU (default: that of --gpu)")
    group.add_argument("--mfu", type=float, default=MFU, help=f"used share of its arithmetic (default: {MFU})")


def plan(arguments: argparse.Namespace, words: list[str]) -> int:
    """Prints the plan; 0 where the run fits as it is configured, else 1."""
    config = Config.from_arguments(words)
    student, teachers = models_of(config)
    found = Plan(config, student, teachers, arguments)
    print(json.dumps(found.as_json()) if arguments.json else found.text(words))
    return int(not found.fits)


def models_of(config: Config) -> tuple[Model, list[Model]]:
    """The student, and the teachers that run, with their vocabulary; no weights are read."""
    from megakd.assembly.architectures import with_vocab
    from megakd.checkpoints.folder import tokenizer_path
    from megakd.converters.direct import section_of
    from megakd.data.tokenizers.load import load_tokenizer

    path = config.student.checkpoint
    student = config.student.model if path is None else section_of(path)
    if student.vocab_size is None:
        student = with_vocab(student, load_tokenizer(tokenizer_path(config.data.tokenizer)), "the student")
    paths = [teacher.checkpoint for teacher in config.teachers]
    if not paths and config.teacher is not None and config.teacher.cache is None:
        paths = [config.teacher.checkpoint]
    return student, [section_of(path) for path in paths]


class Plan:
    """What was found out about a config on so many GPUs.

    Attributes:
        problems: what of it does not fit so many ranks; where there is one, nothing but layouts is known.
        teacher: the largest of the teachers; traffic and speed are told as if all samples were its.
        stage, memory: of the fullest rank.
        layouts: that fit.
    """

    def __init__(self, config: Config, student: Model, teachers: list[Model], arguments: argparse.Namespace):
        self.config, self.student, self.teachers = config, student, teachers
        *others, teacher = sorted(teachers, key=whole_parameters) or [None]
        self.teacher = teacher
        self.nodes, self.gpus, self.mfu = arguments.nodes, arguments.gpus_per_node, arguments.mfu
        self.gpu = ACCELERATORS[arguments.gpu]
        self.memory_bytes = arguments.gpu_memory or self.gpu.memory_bytes
        if min(self.nodes, self.gpus) < 1 or not 0 < self.mfu <= 1:
            raise ConfigError(
                f"--nodes {self.nodes} --gpus-per-node {self.gpus} --mfu {self.mfu}: expected numbers of at least 1, "
                "and a share of at most 1",
                hint="megakd check --help",
            )
        self.world_size = self.nodes * self.gpus
        self.problems = problems_of(config, student, teacher, self.world_size, others)
        shape = (student, teacher, self.nodes, self.gpus, self.memory_bytes)
        self.layouts = fitting_layouts(config, *shape, others)
        self.memory = None
        if not self.problems:
            parallel = config.parallel
            self.dp = self.world_size // (parallel.tp * parallel.pp * parallel.cp)
            self.stage, self.memory = fullest_stage(config, student, teacher, self.dp, others)

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.total <= self.memory_bytes * PLANNED_SHARE

    def traffic(self) -> dict[str, int]:
        parallel, pipeline = self.config.parallel, self.config.student.pipeline
        padded = padded_vocab(max(model.vocab_size for model in (self.student, *self.teachers)))
        mine = rank_parameters(self.student, parallel, padded, self.stage, pipeline)
        return step_traffic(self.config, self.student, self.teacher, mine, self.dp, self.stage)

    def step_tokens(self) -> int:
        return self.config.train.global_batch_size * self.config.data.sequence_length

    def rate(self, config: Config) -> float:
        return tokens_per_second(config, self.student, self.teacher, self.world_size, self.gpu.flops, self.mfu)

    def as_json(self) -> dict:
        found = {
            "student_parameters": whole_parameters(self.student),
            "teacher_parameters": sum(map(whole_parameters, self.teachers)) if self.teachers else None,
            "world_size": self.world_size,
            "problems": self.problems,
            "fits": self.fits,
            "layouts": [
                {"overrides": overrides(layout), "dp": layout.dp, "total_bytes": layout.memory.total}
                for layout in self.layouts
            ],
        }
        if self.memory is None:
            return found
        return found | {
            "stage": self.stage,
            "memory_bytes": self.memory.items() | {"total": self.memory.total},
            "sent_bytes_per_step": self.traffic(),
            "checkpoint_bytes": checkpoint_bytes(self.config, self.student),
            "tokens_per_second": self.rate(self.config),
        }

    def text(self, words: list[str]) -> str:
        lines = [f"student    {describe(self.student)}"]
        own_tp = f" at tp {self.config.teacher_parallel.tp}" if self.config.students_per_teacher > 1 else ""
        if self.config.teachers:
            lines += [
                f"teacher    {describe(model)}, {named.name} (weight {named.weight:g}){own_tp}"
                for named, model in zip(self.config.teachers, self.teachers, strict=True)
            ]
            lines.append("           each sample goes through one of them; traffic and speed are told of the largest")
        elif self.teacher:
            lines.append(f"teacher    {describe(self.teacher)}, beside it{own_tp}")
        elif self.config.teacher:
            of_states = (
                "; its states and output layer are not counted below" if self.config.loss.targets == "whole" else ""
            )
            lines.append(f"teacher    recorded; it does not run{of_states}")
        lines.append(f"on         {self.nodes} x {self.gpus} GPUs of {gigabytes(self.memory_bytes)} GB")
        if self.problems:
            lines += ["", "as it is configured it does not fit these ranks:", *(f"  {text}" for text in self.problems)]
        else:
            lines += [*self.memory_lines(), *self.other_lines()]
        lines += ["", *self.layout_lines(), *self.launch_lines(words)]
        return "\n".join(lines)

    def memory_lines(self) -> list[str]:
        config = self.config
        layout = Layout(config, self.dp, self.memory)
        where = f", stage {self.stage}" if config.parallel.pp > 1 else ""
        padded = padded_vocab(max(model.vocab_size for model in (self.student, *self.teachers)))
        size, tokens = BYTES[config.train.precision], config.train.micro_batch_size * config.data.sequence_length
        fused = is_fused(config, self.student, padded, tokens // config.parallel.cp, size)
        cut = f", over {self.dp} ranks" if config.optimizer.distributed and self.dp > 1 else ""
        fsdp = {whose: ", by FSDP" if config.parallel.shards(whose) else "" for whose in ("student", "teacher")}
        kept = "float32" if fsdp["student"] else config.train.precision
        if config.parallel.fsdp_by == "megatron":
            kept += f" and {config.train.precision}"
        meaning = {
            "weights": f"{kept}, of the student{fsdp['student']}",
            "gradients": "float32",
            "optimizer": f"moments and float32 weights{cut}",
            "teacher": f"{self.whose_weights()}{fsdp['teacher']}",
            "gathered": "whole at one time",
            "lessons": f"of every token of the step: {LESSONS[config.loss.targets]}",
            "activations": f"recompute {config.train.recompute}",
            "working": "logits in blocks, with the loss" if fused else "logits of a micro-batch and their gradients",
            "teacher_pass": "instead of the two above, before them",
        }
        rows = [
            f"  {name.replace('_', ' '):<13}{gigabytes(number):>8}  {meaning[name]}"
            for name, number in self.memory.items().items()
            if number
        ]
        left = f"{gigabytes(self.memory_bytes * PLANNED_SHARE)} GB are planned with; a tenth is CUDA's and NCCL's"
        verdict = "fits" if self.fits else "DOES NOT FIT"
        return [
            f"layout     {layout.words()}",
            "",
            f"GB of the fullest rank{where}:",
            *rows,
            f"  {'most at once':<13}{gigabytes(self.memory.total):>8}  {verdict}: {left}",
        ]

    def whose_weights(self) -> str:
        if not self.config.teachers:
            return "its weights"
        return "weights of the largest, for they are offloaded" if self.config.teacher.offload else "weights of all"

    def other_lines(self) -> list[str]:
        sent = ", ".join(f"{axis} {gigabytes(number)}" for axis, number in self.traffic().items()) or "nothing"
        rate, (needed, _) = self.rate(self.config), step_flops_per_token(self.config, self.student, self.teacher)
        seconds = self.step_tokens() / rate
        return [
            "",
            f"sends      {sent} GB a step and rank",
            f"checkpoint {gigabytes(checkpoint_bytes(self.config, self.student))} GB on the disk",
            f"a step     {self.step_tokens():,} tokens, {self.step_tokens() * needed:.3g} FLOP; {seconds:.3g} s, "
            f"{rate:,.0f} tokens/s",
            f"           if {self.mfu:.0%} of {self.gpu.flops / 1e12:,.0f} TFLOP/s are used, an assumption "
            f"({self.gpu.source})",
        ]

    def layout_lines(self) -> list[str]:
        if not self.layouts:
            return [
                "no layout fits: more nodes, train.micro_batch_size=1, a shorter data.sequence_length, parallel.cp, ",
                "or a recorded teacher (teacher.cache)",
            ]
        rows = [
            f"  {layout.words():<42} {gigabytes(layout.memory.total):>7} GB {self.rate(layout.config):>11,.0f} tokens/s"
            for layout in self.layouts[:SHOWN]
        ]
        more = [f"  and {len(self.layouts) - SHOWN} more"] if len(self.layouts) > SHOWN else []
        return ["layouts that fit, those with the fewest ranks to a model first:", *rows, *more]

    def launch_lines(self, words: list[str]) -> list[str]:
        if not self.fits and not self.layouts:
            return []
        changed = [] if self.fits else overrides(self.layouts[0])
        command = ["megakd", "train", *words, *changed]
        inside = shlex.join(command)
        if self.world_size == 1:
            return ["", "launch:", f"  {inside}"]
        if self.nodes == 1:
            return ["", "launch:", f"  torchrun --standalone --nproc-per-node {self.gpus} -m {inside}"]
        rest = shlex.join([*words[1:], *changed])
        return [
            "",
            "launch, on every node:",
            f"  torchrun --nnodes {self.nodes} --nproc-per-node {self.gpus} --rdzv-backend c10d --rdzv-endpoint "
            f"FIRST_HOST:29500 --rdzv-id RUN -m {inside}",
            "or in examples/slurm:",
            f"  CONFIG={shlex.quote(words[0])} RUN_DIR={shlex.quote(self.config.run.dir)} sbatch --nodes={self.nodes} "
            f"--gpus-per-node={self.gpus} train.sbatch {rest}".rstrip(),
        ]


def overrides(layout: Layout) -> list[str]:
    """What to put on the command line for it."""
    parallel = layout.config.parallel
    said = {"parallel.tp": parallel.tp, "parallel.pp": parallel.pp, "parallel.vpp": parallel.vpp,
            "parallel.sp": str(parallel.sp).lower(), "train.recompute": layout.config.train.recompute}  # fmt: skip
    return [f"{key}={value}" for key, value in said.items()]


def describe(model: Model) -> str:
    """`8.03 B parameters, 32 layers of 4,096`."""
    whole, active = whole_parameters(model), active_parameters(model)
    of_these = f" ({large(active)} a token)" if active != whole else ""
    return f"{large(whole)} parameters{of_these}, {model.num_layers} layers of {model.hidden_size:,}"


def gigabytes(number: float) -> str:
    return f"{number / 1e9:,.2f}" if number < 1e11 else f"{number / 1e9:,.0f}"
