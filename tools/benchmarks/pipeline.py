"""What distillation over a pipeline costs beside its parts: `torchrun --nproc-per-node 2 tools/benchmarks/pipeline.py`.

Teacher and student over two pipeline stages (`--vpp 2`: the student's interleaved). A distillation step is timed beside
its parts, one after the other in every round, so that all see the same machine: the teacher forward-only up to its
logits, and a plain step of the student on cross-entropy. The figure is the median over rounds of step / (sum of parts);
what distillation adds beside the two (selection, its loss) is in it. Wall time, since a pipeline waits.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

from megakd.publish import publish_text

SIZES = {
    "cpu": {"teacher": (8, 256), "student": (4, 192), "vocab": 4096, "sequence": 128, "micro_batches": 8},
    "cuda": {"teacher": (32, 4096), "student": (16, 2048), "vocab": 131072, "sequence": 4096, "micro_batches": 16},
}
TOP_K = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--vpp", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    parser.add_argument("--trace", type=pathlib.Path, help="trace one distillation step into this folder and time none")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megakd.megatron_on_cpu import install
    from megakd.ranks import Ranks

    with Ranks(arguments.device) as ranks:
        install(ranks.device.type)
        benchmark = Benchmark(SIZES[arguments.device], ranks, arguments.vpp, arguments.trace)
        result = benchmark.trace() if arguments.trace else benchmark.run(arguments.rounds)
        if ranks.is_main and result:
            text = json.dumps(result, indent=1)
            print(text)
            if arguments.json:
                publish_text(arguments.json, text + "\n")
    return 0


class Benchmark:
    """One teacher and two students of one shape: one distils, one is trained on its data alone.

    Args:
        size: as in SIZES.
        ranks: of the launch; as many as the pipeline has stages.
        folder: where a trace goes, or None.
    """

    def __init__(self, size: dict, ranks, vpp: int, folder: pathlib.Path | None):
        import torch

        from megakd.config import Config
        from megakd.models.groups import build_groups
        from megakd.models.micro_batch import MicroBatch

        self.size, self.device, self.vpp = size, ranks.device, vpp
        self.config = Config.from_dict(self.values(ranks.world_size, folder))
        self.groups = build_groups(1, ranks.world_size, 1)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, size["vocab"], (size["micro_batches"], 1, size["sequence"] + 1), generator=generator)
        self.batch = [MicroBatch(x[:, :-1].contiguous(), x[:, 1:].contiguous()).to(self.device) for x in ids]
        self.distils, self.plain = self.student(teacher=True), self.student(teacher=False)

    def values(self, pp: int, folder: pathlib.Path | None) -> dict:
        size = self.size
        return {
            "run": {"dir": str(folder or "unused")},
            "parallel": {"pp": pp, "vpp": self.vpp},
            "student": {"model": self.section("student")},
            "teacher": {"checkpoint": "unused"},
            "loss": {"top_k": TOP_K},
            "data": {"train": "unused", "tokenizer": "unused", "sequence_length": size["sequence"]},
            "train": {"steps": 1000, "global_batch_size": size["micro_batches"], "precision": self.precision},
            "optimizer": {"lr": 1e-4},
            "log": {"profile": {"steps": [2, 2]}},
        }

    @property
    def precision(self) -> str:
        return "bf16" if self.device.type == "cuda" else "fp32"

    def section(self, which: str) -> dict:
        layers, hidden = self.size[which]
        return {
            "num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": 4 * hidden,
            "num_attention_heads": hidden // 64, "max_sequence_length": self.size["sequence"],
            "vocab_size": self.size["vocab"], "init_std": 0.05,
        }  # fmt: skip

    def build(self, which: str, parallel):
        from megakd.config import Model
        from megakd.models.gpt import build_gpt

        return build_gpt(
            Model.model_validate(self.section(which)), parallel, self.config.train, self.groups,
            vocab_size=self.size["vocab"], padded_size=self.size["vocab"], device=self.device, seed=1, name=which,
        )  # fmt: skip

    def student(self, *, teacher: bool):
        """A StudentStep; its teacher is the only one."""
        from megakd.assembly.setup import CE_ONLY
        from megakd.teachers.online import OnlineTeacher
        from megakd.training.optimizer import build_optimizer, wrap_data_parallel
        from megakd.training.step import StudentStep

        gpt, source, loss = self.build("student", self.config.parallel), None, CE_ONLY
        if teacher:
            loss = self.config.loss
            frozen = self.build("teacher", self.config.teacher_parallel)
            source = OnlineTeacher(frozen, top_k=TOP_K, temperature=1.0, groups=self.groups)
        ddp = wrap_data_parallel(gpt, self.config, self.groups)
        optimizer, scheduler = build_optimizer(ddp, self.config, self.config.train.steps, self.groups)
        return StudentStep(gpt, ddp, source, None, loss, optimizer, scheduler, self.groups)

    def distil(self) -> None:
        assert self.distils(self.batch, step=1, measure=False)["kd"] > 0

    def teach(self) -> None:
        from megakd.models.forward_only import forward_only

        gpt = self.distils.teacher.gpt

        def logits_alone(hidden_SBH, micro_batch) -> None:
            gpt.logits(hidden_SBH, micro_batch.rows_T)

        forward_only(gpt, self.batch, logits_alone, self.groups)

    def train(self) -> None:
        assert self.plain(self.batch, step=1, measure=False)["ce"] > 0

    def seconds(self, work) -> float:
        """Of the slowest rank; all start together."""
        import torch
        import torch.distributed as dist

        dist.barrier()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        mine = torch.tensor(time.perf_counter() - began, device=self.device)
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        return float(mine)

    def run(self, rounds: int) -> dict:
        """Seconds of everything in every round, and the ratio."""
        works = {"distillation_step": self.distil, "teacher_forward_only": self.teach, "plain_step": self.train}
        for work in [*works.values()] * 2:
            work()
        taken = [{name: self.seconds(work) for name, work in works.items()} for _ in range(rounds)]
        ratios = [r["distillation_step"] / (r["teacher_forward_only"] + r["plain_step"]) for r in taken]
        return {
            "pp": self.groups.pp.size(), "vpp": self.vpp, **self.size, "top_k": TOP_K, "precision": self.precision,
            "median_seconds": {name: statistics.median(r[name] for r in taken) for name in works},
            "ratio": {"median": statistics.median(ratios), "all": [round(ratio, 3) for ratio in sorted(ratios)]},
            "machine": machine(self.device), "commit": commit(),
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip

    def trace(self) -> None:
        """One distillation step, as log.profile traces it."""
        import torch.distributed as dist

        from megakd.training.tracing import Tracer

        self.distil()
        tracer = Tracer(self.config, dist.get_rank(), self.device)
        dist.barrier()
        tracer.before(2)
        dist.barrier()
        self.distil()
        tracer.close()


def machine(device) -> dict:
    import torch

    from megakd.training.run_folder import versions

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{names[0]}, {len(names)} cores" if names else platform.processor()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"device": name, "load_average": load, "versions": versions()}


def commit() -> str:
    where = pathlib.Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=where, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
