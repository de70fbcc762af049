"""Compare runs by their last evaluation: python report.py RUN..."""

import json
import pathlib
import sys


def main(*folders: str) -> int:
    print("| student | held-out CE (nats) | KL to teacher (nats) | top-1 agreement | calibration error |")
    print("|---|---|---|---|---|")
    for folder in map(pathlib.Path, folders):
        lines = (folder / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
        row = json.loads(lines[-1])
        print(f"| {folder.name} | {row['ce']:.3f} | {row['kd']:.3f} | {row['agreement']:.1%} | {row['ece']:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
