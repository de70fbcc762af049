"""What recording costs beside the teacher, and what a cache saves in training: `python tools/benchmarks/cache_run.py`.

A random teacher is run bare (hidden states only), as an online teacher (with selection), and recorded into a cache;
then a student takes the same steps with the live teacher and from the cache. On a GPU seconds of the clock are counted;
on a CPU seconds of the processor (all threads), so that other work on the machine counts less. Best of three passes.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

from megakd.publish import publish_text

SIZES = {
    "cpu": {"teacher": (8, 512), "student": (4, 256), "vocab": 32768, "sequence": 512, "batch": 4, "steps": 6},
    "cuda": {"teacher": (16, 2048), "student": (8, 1024), "vocab": 131072, "sequence": 4096, "batch": 2, "steps": 10},
}
TOP_K = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megakd.megatron_on_cpu import install
    from megakd.ranks import Ranks

    with Ranks(arguments.device) as ranks, tempfile.TemporaryDirectory() as folder:
        install(ranks.device.type)
        result = Benchmark(SIZES[arguments.device], ranks.device, pathlib.Path(folder)).run()
    print(json.dumps(result, indent=1))
    if arguments.json:
        publish_text(arguments.json, json.dumps(result, indent=1) + "\n")
    return 0


class Benchmark:
    """One teacher, one student, some micro-batches.

    Args:
        size: of both, as in SIZES.
        folder: empty; the cache is written below it.
    """

    def __init__(self, size: dict, device, folder: pathlib.Path):
        import torch

        from megakd.config import Config
        from megakd.models.groups import build_groups
        from megakd.models.micro_batch import MicroBatch

        self.size, self.device, self.cache = size, device, folder / "cache"
        self.config = Config.from_dict(self.values())
        self.groups = build_groups(1, 1, 1)
        ids = torch.randint(0, size["vocab"], (size["steps"], size["batch"], size["sequence"] + 1))
        self.batches = [MicroBatch(x[:, :-1].contiguous(), x[:, 1:].contiguous()).to(device) for x in ids]
        self.teacher, self.student = self.build("teacher", 1), self.build("student", 2)

    def values(self) -> dict:
        return {
            "run": {"dir": "unused"},
            "student": {"model": self.section("student")},
            "teacher": {"checkpoint": "unused"},
            "loss": {"top_k": TOP_K},
            "data": {"train": "unused", "tokenizer": "unused", "sequence_length": self.size["sequence"]},
            "train": {"steps": 100, "global_batch_size": self.size["batch"], "precision": "bf16"},
            "optimizer": {"lr": 1e-3},
        }

    def section(self, which: str) -> dict:
        layers, hidden = self.size[which]
        return {
            "num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": 4 * hidden,
            "num_attention_heads": hidden // 64, "max_sequence_length": self.size["sequence"], "init_std": 0.1,
            "vocab_size": self.size["vocab"],
        }  # fmt: skip

    def build(self, which: str, seed: int):
        from megakd.config import Model
        from megakd.models.gpt import build_gpt

        return build_gpt(
            Model.model_validate(self.section(which)), self.config.parallel, self.config.train, self.groups,
            vocab_size=self.size["vocab"], padded_size=self.size["vocab"], device=self.device, seed=seed,
        )  # fmt: skip

    def run(self) -> dict:
        """All figures: seconds a token of each way to run the teacher, seconds a step of each way to train."""
        from megakd.cache import CacheReader
        from megakd.models.forward_only import forward_only
        from megakd.teachers.cached import CachedTeacher
        from megakd.teachers.online import OnlineTeacher

        tokens = self.size["steps"] * self.size["batch"] * self.size["sequence"]
        online = OnlineTeacher(self.teacher, top_k=TOP_K, temperature=1.0, groups=self.groups)
        bare = self.time(lambda batch: forward_only(self.teacher, [batch], lambda *_: None, self.groups))
        selected = self.time(lambda batch: online.lessons([batch]))
        recorded = self.record()
        cached = CachedTeacher([CacheReader(self.cache, top_k=TOP_K)], self.groups, {})
        reading = self.time(lambda batch: cached.lessons([batch]))
        trained_online, trained_cached = self.train(online), self.train(cached)
        return {
            "device": str(self.device), "clock": "wall" if self.device.type == "cuda" else "processor", **self.size,
            "teacher_microseconds_per_token": {
                "forward": bare / tokens * 1e6,
                "forward_and_selection": selected / tokens * 1e6,
                "recording": recorded / tokens * 1e6,
            },
            "writer_overhead": {
                "over_forward": (recorded - selected) / bare,
                "over_forward_and_selection": recorded / selected - 1,
            },
            "step_seconds": {
                "online": trained_online / self.size["steps"],
                "cached": trained_cached / self.size["steps"],
            },
            "saved_over_teacher": (trained_online - trained_cached) / selected,
            "cache_reading_share_of_step": reading / trained_cached,
        }  # fmt: skip

    def time(self, work, passes: int = 3) -> float:
        """Seconds for all micro-batches, the best of some passes after one micro-batch that is not counted."""
        work(self.batches[0])
        best = float("inf")
        for _ in range(passes):
            start = self.now()
            for batch in self.batches:
                work(batch)
            best = min(best, self.now() - start)
        return best

    def now(self) -> float:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def record(self) -> float:
        """Seconds of recording all micro-batches: forward, selection, encoding, and a shard on disk; best of three."""
        from megakd.cache import finish, writing
        from megakd.recording.part_writer import PartWriter
        from megakd.recording.recorder import Recorder
        from megakd.recording.setup import make_contents
        from megakd.teachers.entries import Recipe

        recipe = Recipe("top_k", TOP_K, (1.0,))
        contents = make_contents(recipe, "q8", self.size["vocab"])
        recorder = Recorder(self.teacher, recipe, self.groups, seed=1)
        header, best = cache_header(contents), float("inf")
        with writing(self.cache, header):
            recorder.rows(self.batches[:1])
            for part in range(header.parts):
                start = self.now()
                with PartWriter(self.cache, contents, enabled=True) as writer:
                    writer.measured = True  # the report on the codec's error is no part of recording
                    for batch in self.batches:
                        writer.add(recorder.rows([batch]))
                    writer.publish(part)
                best = min(best, self.now() - start)
            finish(self.cache, header)
        return best

    def train(self, teacher) -> float:
        """Seconds of one optimizer step for each micro-batch."""
        from megakd.training.optimizer import build_optimizer, wrap_data_parallel
        from megakd.training.step import StudentStep

        ddp = wrap_data_parallel(self.student, self.config, self.groups)
        optimizer, scheduler = build_optimizer(ddp, self.config, 100, self.groups)
        step = StudentStep(self.student, ddp, teacher, None, self.config.loss, optimizer, scheduler, self.groups)
        return self.time(lambda batch: step([batch], step=1, measure=False))


def cache_header(contents):
    from megakd.cache import Header

    return Header(
        contents=contents, mode="top_k", options={}, tail="measured", tokenizer_fingerprint="", teacher_fingerprint="",
        data={}, parts=3, created={"command": "benchmark", "megakd_version": ""},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
