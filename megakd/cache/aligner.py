"""NeMo-Aligner's teacher logits: JSONL chunks of samples, read into cache rows and written from them.

One JSON object a line, all lists over the S positions of a padded sample:

    tokens, labels              ids; label t is token t + 1
    loss_mask                   0 or 1: which positions are supervised
    topk_logits [S][K]          the K largest logits, minus the largest of all
    topk_token_ids [S][K]       their ids
    log_sum_exp_logits [S]      log-sum-exp of all logits, minus the largest of all

Files are named by a template in which CHUNK_ID stands for 0, 1, 2, ... Other keys are ignored.

Sizes: S positions, T of them supervised, K entries.
Source: NeMo-Aligner, docs/user-guide/knowledge_distillation.rst and compute_topk_logits.py.
"""

import json
import pathlib
import re
from typing import NamedTuple

import numpy as np

from megakd.cache.row import Contents, Row
from megakd.errors import CacheError

CHUNK = "CHUNK_ID"
KEYS = ("tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids", "log_sum_exp_logits")
MASS_TOLERANCE = 2e-2  # of bfloat16 logits


def find_chunks(template: str) -> list[pathlib.Path]:
    """The files of a template, in order; a template without CHUNK_ID is one file.

    Raises:
        CacheError: there is none.
    """
    if CHUNK not in template:
        files = [pathlib.Path(template)] if pathlib.Path(template).is_file() else []
    else:
        files = []
        while (path := pathlib.Path(template.replace(CHUNK, str(len(files))))).is_file():
            files.append(path)
        check_no_gap(template, len(files))
    if not files:
        first = template.replace(CHUNK, "0")
        raise CacheError(
            f"{first} does not exist", hint=f"--input takes a path in which {CHUNK} stands for 0, 1, 2, ..."
        )
    return files


def check_no_gap(template: str, number: int) -> None:
    """Raises CacheError where chunk `number` is missing and a later one is there."""
    missing = pathlib.Path(template.replace(CHUNK, str(number)))
    name = re.compile(re.escape(pathlib.Path(template).name).replace(CHUNK, r"(\d+)", 1).replace(CHUNK, r"\1"))
    found = [match for entry in missing.parent.glob("*") if (match := name.fullmatch(entry.name)) and name.groups]
    if later := [int(match[1]) for match in found if int(match[1]) > number]:
        raise CacheError(
            f"{missing} does not exist, but chunk {min(later)} does",
            hint=f"{CHUNK} stands for 0, 1, 2, ... without gaps: copy the missing chunk, or rename the others",
        )


class Sample(NamedTuple):
    """A line without its padding.

    ids_S: int64, up to the last supervised position. mask_S: bool; the last is True. last_label: what follows.
    ids_TK, logits_TK, log_sum_exp_T: of the supervised positions.
    """

    ids_S: np.ndarray
    mask_S: np.ndarray
    last_label: int
    ids_TK: np.ndarray
    logits_TK: np.ndarray
    log_sum_exp_T: np.ndarray


def parse_line(line: bytes, where: str) -> Sample | None:
    """One line of a chunk; None if nothing of it is supervised.

    Args:
        where: file and line, for messages.
    Raises:
        CacheError: keys, lengths or values that are not what the format says.
    """
    try:
        record = json.loads(line)
        ids_S, labels_S, ids_SK = (read_ids(record[key]) for key in ("tokens", "labels", "topk_token_ids"))
        mask_S = np.asarray(record["loss_mask"], np.float64) > 0
        logits_SK, log_sum_exp_S = (
            np.asarray(record[key], np.float64) for key in ("topk_logits", "log_sum_exp_logits")
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise wrong(where, f"{type(error).__name__}: {error}") from error
    except KeyError as error:
        raise wrong(where, f"it has no {error}; expected {', '.join(KEYS)}") from error
    shapes = [ids_S.shape, labels_S.shape, mask_S.shape, log_sum_exp_S.shape, ids_SK.shape[:1]]
    if (
        ids_S.ndim != 1
        or len(set(shapes)) > 1
        or ids_SK.ndim != 2
        or logits_SK.shape != ids_SK.shape
        or not ids_SK.size
    ):
        raise wrong(where, f"its lists have different lengths: {shapes}, topk {ids_SK.shape} and {logits_SK.shape}")
    if not mask_S.any():
        return None
    length = int(np.flatnonzero(mask_S)[-1]) + 1
    ids_S, labels_S, mask_S = ids_S[:length], labels_S[:length], mask_S[:length]
    moved = np.flatnonzero(mask_S[:-1] & (labels_S[:-1] != ids_S[1:]))
    if len(moved):
        at = int(moved[0])
        raise wrong(where, f"label {labels_S[at]} of position {at} is not the next token, {ids_S[at + 1]}")
    kept = np.flatnonzero(mask_S)
    return Sample(ids_S, mask_S, int(labels_S[-1]), ids_SK[kept], logits_SK[kept], log_sum_exp_S[kept])


def read_ids(values: list) -> np.ndarray:
    """Whole numbers as int64, whatever JSON wrote them as; ValueError for others."""
    numbers = np.asarray(values)
    if not np.issubdtype(numbers.dtype, np.integer) and not (np.asarray(values, np.float64) % 1 == 0).all():
        raise ValueError(f"token ids must be whole numbers, not {values}"[:80])
    return numbers.astype(np.int64)


def to_row(sample: Sample, key: bytes, vocab_size: int, where: str) -> tuple[Row, int]:
    """The cache row of a sample, its tail derived as log(1 - sum of the entries) in float64.

    Entries that sum to more than 1, as bfloat16 logits do now and then, are scaled to 1 and have no tail.

    Returns:
        The row, and how many tokens were scaled.
    Raises:
        CacheError: ids outside the vocabulary or twice, values that are not finite, or sums far above 1.
    """
    order_TK = np.argsort(sample.ids_TK, axis=1)
    ids_TK = np.take_along_axis(sample.ids_TK, order_TK, 1)
    logprobs_TK = np.take_along_axis(sample.logits_TK, order_TK, 1) - sample.log_sum_exp_T[:, None]
    if ids_TK[:, 0].min() < 0 or ids_TK[:, -1].max() >= vocab_size:
        raise wrong(where, f"topk_token_ids go from {ids_TK.min()} to {ids_TK.max()}, the vocabulary has {vocab_size}")
    if (ids_TK[:, 1:] == ids_TK[:, :-1]).any():
        raise wrong(where, "a position has the same id twice among its topk_token_ids")
    if not np.isfinite(logprobs_TK).all():
        raise wrong(where, f"a logit or log-sum-exp is {logprobs_TK[~np.isfinite(logprobs_TK)][0]}")
    mass_T = np.exp(logprobs_TK).sum(1)
    if mass_T.max() > 1 + MASS_TOLERANCE:
        raise wrong(
            where,
            f"the entries of a position sum to {mass_T.max():.4g}: topk_logits and log_sum_exp_logits do not belong "
            "together",
        )
    above_T = mass_T >= 1
    logprobs_TK -= np.where(above_T, np.log(mass_T), 0)[:, None]
    with np.errstate(divide="ignore"):
        log_tail_T = np.where(above_T, -np.inf, np.log1p(-np.minimum(mass_T, 1)))
    labels_T = np.append(sample.ids_S[1:], sample.last_label)[sample.mask_S]
    known_TK = ids_TK == labels_T[:, None]
    label_T = np.where(known_TK.any(1), np.where(known_TK, logprobs_TK, 0).sum(1), np.nan)
    tokens, slots = ids_TK.shape
    row = Row(
        key=key,
        mask_S=sample.mask_S,
        last_label=sample.last_label,
        counts_T=np.full(tokens, slots),
        ids_N=ids_TK.ravel(),
        logprobs_N=logprobs_TK.astype(np.float32).ravel(),
        log_tail_XT=log_tail_T[None].astype(np.float32),
        label_logprob_T=label_T.astype(np.float32),
        top_id_T=ids_TK[np.arange(tokens), logprobs_TK.argmax(1)],
    )
    return row, int(above_T.sum())


def format_line(ids_S: np.ndarray, labels_S: np.ndarray, row: Row, contents: Contents) -> str:
    """A line from a cache row; positions that were not recorded hold a uniform distribution and mask 0.

    Args:
        ids_S: the sample's ids.
        labels_S: the next ids; whatever belongs there where nothing is supervised.
        row: decoded at the first temperature; all its tokens have the same number of entries.
    """
    tokens, top_k = len(row.counts_T), contents.top_k
    logprobs_TK, ids_TK = row.logprobs_N.reshape(tokens, top_k).astype(np.float64), row.ids_N.reshape(tokens, top_k)
    order_TK = np.argsort(-logprobs_TK, axis=1, kind="stable")
    logprobs_TK, ids_TK = np.take_along_axis(logprobs_TK, order_TK, 1), np.take_along_axis(ids_TK, order_TK, 1)
    length = len(ids_S)
    logits_SK, ids_SK = np.zeros((length, top_k)), np.tile(np.arange(top_k), (length, 1))
    log_sum_exp_S = np.full(length, np.log(top_k))
    logits_SK[row.mask_S], ids_SK[row.mask_S] = logprobs_TK - logprobs_TK[:, :1], ids_TK
    log_sum_exp_S[row.mask_S] = -logprobs_TK[:, 0]
    columns = (ids_S, labels_S, row.mask_S.astype(int), logits_SK, ids_SK, log_sum_exp_S)
    return json.dumps({key: column.tolist() for key, column in zip(KEYS, columns, strict=True)})


def check_exportable(folder, contents: Contents, mode: str) -> None:
    """Raises CacheError for a cache that the format has no words for."""
    if contents.sampled or contents.hidden_size or mode == "top_p":
        raise CacheError(
            f"{folder} was recorded with cache.mode={mode}; NeMo-Aligner's format holds the same number of most likely "
            "entries for every token",
            hint="record with cache.mode=top_k to export",
        )


def wrong(where: str, reason: str) -> CacheError:
    return CacheError(f"{where}: {reason}", hint="write the chunk again; nothing of this import is published")
