"""Collect this Python's standard library as a corpus: one JSON line a source file, split into train and validation.

    python corpus.py OUTPUT_FOLDER

Nothing is downloaded. A file goes to validation by a hash of its name, so the split is the same for every seed.
"""

import contextlib
import hashlib
import json
import pathlib
import sys
import sysconfig

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}
VALIDATION_SHARE = 0.05


def main(output: str) -> None:
    library, folder = pathlib.Path(sysconfig.get_paths()["stdlib"]), pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": 0, "validation": 0}
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / f"{split}.jsonl", "w", encoding="utf-8")) for split in sizes}
        for path in sorted(library.rglob("*.py")):
            name = path.relative_to(library)
            if LEFT_OUT & set(name.parts):
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few files declare another encoding
            share = int(hashlib.sha256(name.as_posix().encode()).hexdigest()[:8], 16) / 16**8
            split = "validation" if share < VALIDATION_SHARE else "train"
            files[split].write(json.dumps({"text": text}) + "\n")
            sizes[split] += len(text)
    print(", ".join(f"{split}: {size / 1e6:.1f} MB" for split, size in sizes.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
