"""Small made-up recordings: rows of a random teacher, headers, and whole caches."""

import dataclasses

import numpy as np

from megakd.cache import Contents, Header, Row, encode_row, finish, publish_part, writing
from megakd.cache.shard import ShardWriter
from megakd.targets import sample_key

V, S = 211, 23
CONTENTS = Contents(vocab_size=V, top_k=7, temperatures=(1.0, 2.0), codec="fp32")


def make_header(contents=CONTENTS, parts=1, **changes) -> Header:
    header = Header(
        contents=contents,
        mode="sampled" if contents.sampled else "top_k",
        options={"precision": "fp32"},
        tail="measured",
        tokenizer_fingerprint="abc123",
        teacher_fingerprint="f00d",
        data={"train": "corpus", "sequence_length": S},
        parts=parts,
        created={"command": "test", "megakd_version": "0"},
    )
    return dataclasses.replace(header, **changes)


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def make_sample(number: int, supervised: float = 0.7, length: int = S):
    """(ids, mask, last label) of sample `number`, the same every time."""
    generator = np.random.default_rng([7, number])
    ids = generator.integers(0, V, length)
    mask_S = generator.random(length) < supervised
    mask_S[number % length] = True
    return ids, mask_S, int(generator.integers(0, V)) if mask_S[-1] else -1


def make_logits(number: int, tokens: int):
    return np.random.default_rng([11, number]).normal(0, 3, (tokens, V))


def make_row(number: int, contents=CONTENTS, sample=None, ragged=False) -> Row:
    """The row of a sample: its teacher's K most likely ids; of sampled contents all but the first drawn once."""
    ids, mask_S, last_label = sample or make_sample(number)
    tokens = int(mask_S.sum())
    logits = make_logits(number, tokens)
    first = log_softmax(logits / contents.temperatures[0])
    counts_T = np.full(tokens, contents.top_k)
    if ragged:
        counts_T = np.random.default_rng(number).integers(1, contents.top_k + 1, tokens)
    order = np.argsort(-logits, axis=1, kind="stable")
    entries = [np.sort(row[:count]) for row, count in zip(order, counts_T, strict=True)]
    token_N, ids_N = (
        np.repeat(np.arange(tokens), counts_T),
        np.concatenate([*entries, np.empty(0, np.int64)]).astype(int),
    )
    tails = []
    for temperature in contents.temperatures:
        logs = log_softmax(logits / temperature)
        logs[token_N, ids_N] = -np.inf
        tails.append(np.log(np.exp(logs).sum(1)))
    logprobs_N, entropy_T = first[token_N, ids_N], None
    if contents.sampled:
        draws = np.ones((tokens, contents.top_k), np.int64)
        draws[:, 0] += contents.draws - contents.top_k
        logprobs_N, tails = np.log(draws / contents.draws).ravel(), []
        entropy_T = -(np.exp(first) * first).sum(1).astype(np.float32)
    return Row(
        key=sample_key(ids),
        mask_S=mask_S,
        last_label=last_label,
        counts_T=counts_T,
        ids_N=ids_N,
        logprobs_N=logprobs_N.astype(np.float32),
        log_tail_XT=np.array(tails, np.float32).reshape(len(tails), tokens),
        label_logprob_T=log_softmax(logits)[:, 5].astype(np.float32),
        top_id_T=order[:, 0],
        entropy_T=entropy_T,
    )


def write_part(folder, part: int, rows, contents=CONTENTS):
    shard = ShardWriter()
    for row in rows:
        shard.add(encode_row(row, contents))
    return publish_part(folder, part, shard)


def make_cache(folder, samples=range(12), per_part=5, contents=CONTENTS, **changes) -> Header:
    """A finished cache of the samples' rows."""
    samples = list(samples)
    parts = [samples[first : first + per_part] for first in range(0, len(samples), per_part)]
    header = make_header(contents, len(parts), **changes)
    with writing(folder, header) as whole:
        for part, numbers in enumerate(parts):
            if part not in whole:
                write_part(folder, part, [make_row(number, contents) for number in numbers], contents)
        return finish(folder, header)
