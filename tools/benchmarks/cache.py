"""How large and how fast a logit cache is: `python tools/benchmarks/cache.py [--quick] [--json FILE]`.

Samples of 4096 tokens with K = 64 of V = 131,072 (a made-up teacher whose mass outside the K is about 10 %), codec by
codec: bytes a token at 256 and at 4096 tokens a sample, the error of the stored distribution, seconds to encode and to
decode, and random-order reading beside a line scan of NeMo-Aligner's JSONL. Correctness is checked before anything is
timed: what is read back is what was written, to the codec's bound.
"""

import argparse
import json
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import numpy as np

from megakd.cache import CacheReader, Contents, Header, Row, decode_row, encode_row, finish, publish_part, writing
from megakd.cache.aligner import format_line, parse_line, to_row
from megakd.cache.segments import reduce_tokens
from megakd.cache.shard import ShardWriter
from megakd.publish import publish_text
from megakd.targets import sample_key

V, K, PER_SHARD = 131072, 64, 16


def make_rows(samples: int, tokens: int) -> list[tuple[np.ndarray, Row]]:
    """(ids, row) of samples all of whose positions are supervised."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(samples):
        ids_S = generator.integers(0, V, tokens)
        first_TK = np.sort(generator.random((tokens, K)), axis=1) * (V - K)
        ids_TK = first_TK.astype(np.int64) + np.arange(K)
        logprobs_TK = generator.normal(0, 2.5, (tokens, K))
        tail_T = np.log(generator.random(tokens) * 0.2)
        logprobs_TK += (np.log1p(-np.exp(tail_T)) - np.log(np.exp(logprobs_TK).sum(1)))[:, None]
        row = Row(
            key=sample_key(ids_S),
            mask_S=np.ones(tokens, bool),
            last_label=1,
            counts_T=np.full(tokens, K),
            ids_N=ids_TK.ravel(),
            logprobs_N=logprobs_TK.astype(np.float32).ravel(),
            log_tail_XT=tail_T[None].astype(np.float32),
            label_logprob_T=np.full(tokens, -1.0, np.float32),
            top_id_T=ids_TK[np.arange(tokens), logprobs_TK.argmax(1)],
        )
        rows.append((ids_S, row))
    return rows


def write_cache(folder, rows, contents: Contents) -> tuple[float, float]:
    """Write a finished cache; returns (seconds of encoding and writing a token, bytes of the folder a token)."""
    parts = [rows[first : first + PER_SHARD] for first in range(0, len(rows), PER_SHARD)]
    header = Header(
        contents=contents, mode="top_k", options={}, tail="measured", tokenizer_fingerprint="", teacher_fingerprint="",
        data={}, parts=len(parts), created={"command": "benchmark", "megakd_version": ""},
    )  # fmt: skip
    seconds = 0.0
    with writing(folder, header):
        for part, members in enumerate(parts):
            start, shard = time.perf_counter(), ShardWriter()
            for _, row in members:
                shard.add(encode_row(row, contents))
            publish_part(folder, part, shard)
            seconds += time.perf_counter() - start
        tokens = finish(folder, header).tokens
    size = sum(path.stat().st_size for path in pathlib.Path(folder).iterdir())
    return seconds / tokens, size / tokens


def codec_errors(rows, contents: Contents) -> dict:
    """KL(exact || stored) of the entries, nats a token, and the largest error of a log-probability."""
    kl, worst = [], 0.0
    for _, row in rows[:4]:
        got = decode_row(encode_row(row, contents), contents)
        assert (got.ids_N == row.ids_N).all() and (got.top_id_T == row.top_id_T).all()
        exact_N = row.logprobs_N.astype(np.float64)
        kl.append(reduce_tokens(np.add, np.exp(exact_N) * (exact_N - got.logprobs_N), row.counts_T))
        worst = max(worst, float(np.abs(exact_N - got.logprobs_N).max()))
        ranges_T = np.ptp(exact_N.reshape(-1, K), axis=1)
        assert contents.codec != "q8" or worst <= ranges_T.max() * 1.001 / 255 + 1e-5, "q8 breaks its bound"
    kl_T = np.concatenate(kl)
    return {"kl_mean_nats": float(kl_T.mean()), "kl_max_nats": float(kl_T.max()), "logprob_error_max_nats": worst}


def read_in_random_order(folder, rows, passes: int) -> float:
    """Tokens a second of one process that looks samples up by their ids, as training does; best of `passes`."""
    reader, best = CacheReader(folder), float("inf")
    order = np.random.default_rng(1).permutation(len(rows))
    for _ in range(passes + 1):  # the first pass opens the shards
        start = time.perf_counter()
        tokens = 0
        for number in order:
            ids_S, row = rows[number]
            tokens += len(reader.table(sample_key(ids_S), row.mask_S, row.last_label).log_tail_T)
        best = min(best, time.perf_counter() - start)
    return tokens / best


def aligner_scan(folder, rows, samples: int) -> dict:
    """NeMo-Aligner's way to a random sample: read lines up to it, parse it. Extrapolated to a file of `samples`.

    Returns:
        bytes a token of its JSONL; seconds to read past one line, to parse one; tokens a second of random access.
    """
    ids_S, row = rows[0]
    contents = Contents(V, K, (1.0,), "fp32")
    line = format_line(ids_S, np.append(ids_S[1:], 1), row, contents)
    back, _ = to_row(parse_line(line, "benchmark"), row.key, V, "benchmark")
    assert (back.ids_N == row.ids_N).all() and np.allclose(back.logprobs_N, row.logprobs_N, atol=1e-5)
    path, lines = pathlib.Path(folder) / "scan.jsonl", 8
    path.write_text((line + "\n") * lines)
    start = time.perf_counter()
    with open(path, encoding="utf-8") as file:
        for _ in file:
            pass
    past = (time.perf_counter() - start) / lines
    start = time.perf_counter()
    json.loads(line)
    parse = time.perf_counter() - start
    return {
        "bytes_per_token": len(line) / len(ids_S),
        "line_seconds": past,
        "parse_seconds": parse,
        "samples_in_file": samples,
        "tokens_per_second": len(ids_S) / (past * samples / 2 + parse),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples: a smoke test, not a measurement")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    arguments = parser.parse_args()
    samples, passes = (4, 1) if arguments.quick else (48, 5)
    result = {"machine": machine(), "tokens_per_sample": 4096, "top_k": K, "vocab_size": V, "codecs": {}}
    rows, short = make_rows(samples, 4096), make_rows(4 * samples, 256)
    with tempfile.TemporaryDirectory() as scratch:
        for codec in ("fp32", "fp16", "q8"):
            contents = Contents(V, K, (1.0,), codec)
            errors = codec_errors(rows, contents)
            write_seconds, size = write_cache(f"{scratch}/{codec}", rows, contents)
            _, short_size = write_cache(f"{scratch}/{codec}_256", short, contents)
            result["codecs"][codec] = errors | {
                "bytes_per_token_4096": size,
                "bytes_per_token_256": short_size,
                "write_microseconds_per_token": write_seconds * 1e6,
                "read_tokens_per_second": read_in_random_order(f"{scratch}/{codec}", rows, passes),
            }
        result["aligner"] = aligner_scan(scratch, rows, 10_000)
    show(result)
    if arguments.json:
        publish_text(arguments.json, json.dumps(result, indent=1) + "\n")
    return 0


def machine() -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")  # noqa: SIM115
    return {
        "cpu": cpu,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "commit": commit.stdout.strip(),
        "command": " ".join(sys.argv),
    }


def show(result: dict) -> None:
    print("codec  B/token (4096, 256 a sample)  KL mean, max (nats)   max error  write us/token  read tokens/s")
    for codec, figures in result["codecs"].items():
        print(
            f"{codec:5}  {figures['bytes_per_token_4096']:7.2f} {figures['bytes_per_token_256']:7.2f}"
            f"{figures['kl_mean_nats']:22.1e} {figures['kl_max_nats']:.1e} {figures['logprob_error_max_nats']:10.1e}"
            f"{figures['write_microseconds_per_token']:14.2f}  {figures['read_tokens_per_second']:14,.0f}"
        )
    scan = result["aligner"]
    ratio = result["codecs"]["fp16"]["read_tokens_per_second"] / scan["tokens_per_second"]
    print(f"NeMo-Aligner's JSONL at K = {K}: {scan['bytes_per_token']:,.0f} B/token")
    print(
        f"a random sample of its file of {scan['samples_in_file']:,}: {scan['tokens_per_second']:,.1f} tokens/s; "
        f"the fp16 cache: {ratio:,.0f} times that"
    )


if __name__ == "__main__":
    sys.exit(main())
