"""Compare a student distilled from the cache with the same student distilled online: python report.py RUNS_FOLDER"""

import json
import pathlib
import statistics
import sys

WARM = 5  # first steps, which also start threads and open files


def main(folder: str) -> int:
    out = pathlib.Path(folder)
    rows = {name: read_run(out / name) for name in ("online", "cached")}
    print("| student | held-out CE (nats) | KL to teacher (nats) | top-1 agreement | seconds a step | of it data |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['ce']:.4f} | {row['kd']:.4f} | {row['agreement']:.1%} | {row['seconds']:.3f} "
            f"| {row['data_seconds'] / row['seconds']:.1%} |"
        )
    saved = rows["online"]["seconds"] - rows["cached"]["seconds"]
    print(f"\nFrom the cache a step takes {saved:.3f} s less; the teacher's forward is what is not done.")
    return 0


def read_run(run: pathlib.Path) -> dict:
    """The evaluation of a run, and the median seconds of its steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "train"][WARM:]
    evaluation = json.loads((run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return evaluation | {key: statistics.median(step[key] for step in steps) for key in ("seconds", "data_seconds")}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
