"""Reference curves: twenty steps of every kind of training in float32, kept in curves.json.

    python -m tests.training.curves            # compares, prints the largest difference of each
    python -m tests.training.curves --write    # makes curves.json anew

A changed curve is a commit of its own that says why. What is left out: metrics that are none of the student's.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile

from tests.ranks import close_pools, run_ranks
from tests.training import small, test_packing

STEPS = 20
REPEATED = 3  # batches, again and again, so that there is something to learn
NUMBERS = ("loss", "kd", "ce", "grad_norm")
FILE = pathlib.Path(__file__).with_name("curves.json")
# Relative. Rounding grows over twenty steps; layouts end a hundredth of this apart, another kind of CPU may be further.
TOLERANCE = 5e-5
EXPERTS = {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 16}}
LATENT = {
    "num_query_groups": 4,
    "mla": {"kv_lora_rank": 12, "q_lora_rank": 20, "qk_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kind of training.

    Attributes:
        tp, pp, dp: the layout.
        data: `plain` batches, one `packed` batch again and again, or plain ones with a `cached` teacher.
        student: changes of the student's section.
        changes: dotted keys of the config, with __ for the dot.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    data: str = "plain"
    student: dict = dataclasses.field(default_factory=dict)
    changes: dict = dataclasses.field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp


VARIANTS = {
    "tp 1": Variant(),
    "tp 2": Variant(tp=2),
    "tp 2, sequence parallel": Variant(tp=2, changes={"parallel__sp": True}),
    "pp 2": Variant(pp=2),
    "dp 2": Variant(dp=2),
    "packed": Variant(data="packed"),
    "experts": Variant(student=EXPERTS),
    "latent attention, tp 2": Variant(tp=2, student=LATENT),
    "cached": Variant(data="cached"),
    "reverse KL, renormalized": Variant(changes={"loss__divergence": "reverse_kl", "loss__tail": "renormalize"}),
    "jsd": Variant(changes={"loss__divergence": "jsd"}),
}


def curve(name: str) -> list[dict[str, float]]:
    """The numbers of each step of a variant, from ranks of tests/ranks.py."""
    return run_ranks(VARIANTS[name].ranks, train, VARIANTS[name])[-1]


def train(rank: int, ranks: int, variant: Variant) -> list[dict[str, float]]:
    with small.layout(variant.tp, variant.pp) as groups, tempfile.TemporaryDirectory() as folder:
        run = small.student_step(small.config(variant.tp, variant.pp, **variant.changes), groups, **variant.student)
        batches = [batch(variant, step, groups) for step in range(STEPS)]
        if variant.data == "cached":
            run.teacher = recorded(run.teacher, batches, pathlib.Path(folder))
        metrics = [run(b, step=step + 1, measure=True) for step, b in enumerate(batches)]
    return [{name: m[name] for name in NUMBERS} for m in metrics]


def batch(variant: Variant, step: int, groups) -> list:
    if variant.data == "packed":
        from megakd.models.micro_batch import build_micro_batch

        return [build_micro_batch(test_packing.loaded(True), packed=True)]
    return small.batch(step % REPEATED, groups, 4 // variant.dp)


def recorded(teacher, batches: list, folder: pathlib.Path):
    """The teacher's own words on these batches, written to a cache and read back."""
    record(teacher, batches, folder / "cache")
    return read(folder / "cache", teacher)


def read(folder: pathlib.Path, teacher):
    """The recorded teacher in the place of the one that runs."""
    from megakd.cache import CacheReader
    from megakd.teachers.cached import CachedTeacher

    return CachedTeacher([CacheReader(folder, temperature=teacher.temperature)], teacher.groups, {})


def record(teacher, batches: list, folder: pathlib.Path) -> None:
    """Write them, on one rank that is the whole model."""
    from megakd.cache import Contents, Header, encode_row, finish, publish_part, writing
    from megakd.cache.shard import ShardWriter
    from megakd.recording.recorder import Recorder
    from megakd.teachers.entries import Recipe

    recipe = Recipe("top_k", teacher.top_k, (teacher.temperature,))
    contents = Contents(small.VOCAB, teacher.top_k, (teacher.temperature,), "fp32")
    header = Header(
        contents=contents,
        mode="top_k",
        options={},
        tail="measured",
        tokenizer_fingerprint="",
        teacher_fingerprint="",
        data={},
        parts=1,
        created={},
    )
    recorder, shard = Recorder(teacher.gpt, recipe, teacher.groups, seed=1), ShardWriter()
    with writing(folder, header):
        for row in {row.key: row for b in batches for row in recorder.rows(b)}.values():
            shard.add(encode_row(row, contents))
        publish_part(folder, 0, shard)
        finish(folder, header)


def difference(got: list[dict], want: list[dict]) -> float:
    """The largest relative difference of a number at a step."""
    assert len(got) == len(want) == STEPS
    pairs = [(a[name], b[name]) for a, b in zip(got, want, strict=True) for name in NUMBERS]
    return max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make curves.json anew")
    arguments = parser.parse_args()
    curves = {name: curve(name) for name in VARIANTS}
    close_pools()
    known = json.loads(FILE.read_text()) if FILE.is_file() else {}
    for name, got in curves.items():
        print(f"{name}: {difference(got, known[name]):.1e}" if name in known else f"{name}: new", file=sys.stderr)
    if arguments.write:
        FILE.write_text(
            "{\n"
            + ",\n".join(
                f' "{name}": [\n' + ",\n".join(f"  {json.dumps(step)}" for step in steps) + "\n ]"
                for name, steps in curves.items()
            )
            + "\n}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
