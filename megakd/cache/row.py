"""One sample's row: what the teacher said at its supervised positions, as arrays and as bytes.

The payload is these parts one after the other, padded with zeros to a multiple of 8 bytes; `<f4` is little-endian
float32:

    log_tail        <f4 [X, T]  for each recorded temperature; absent where entries stand for the whole vocabulary
    label_logprob   <f4 [T]     log-probability of the label at temperature 1
    entropy         <f4 [T]     sampled only
    logprobs                    `logprobs`, at the first recorded temperature
    ids                         `elias_fano`
    top_id                      `bits`, as many as V - 1 has: the teacher's most likely id

or, of a cache of hidden states, those alone (`hidden`).

Sizes: S ids of the sample, T of them supervised, N entries of all tokens together, X recorded temperatures, H channels.
"""

import dataclasses
import struct
import zlib
from typing import NamedTuple

import numpy as np
from torch import Tensor

from megakd.cache.bits import pack, packed_bytes, unpack
from megakd.cache.elias_fano import decode_ids, encode_ids, ids_bytes
from megakd.cache.hidden import decode_hidden, encode_hidden, hidden_bytes
from megakd.cache.logprobs import decode_logprobs, encode_logprobs, log_mass, logprobs_bytes
from megakd.errors import CacheError

NO_LABEL = -1


@dataclasses.dataclass(frozen=True)
class Contents:
    """What every row of a cache holds; a part of its header.

    Attributes:
        vocab_size: V; every id is below it.
        top_k: most entries that a token has; 0 of hidden states.
        temperatures: what the teacher's logits were divided by, each with its own tail; entries are at the first.
            None of hidden states, which give any.
        codec: of the log-probabilities, one of `logprobs.CODECS`; of hidden states, of `hidden`.
        sampled: entries stand for the whole vocabulary (no tail), and the teacher's exact entropy is stored.
        draws: of a codec that counts them, else 0.
        hidden_size: channels of the teacher's last hidden states, which are all that is stored; 0 of entries.
    """

    vocab_size: int
    top_k: int
    temperatures: tuple[float, ...]
    codec: str
    sampled: bool = False
    draws: int = 0
    hidden_size: int = 0


@dataclasses.dataclass(frozen=True)
class HiddenRow:
    """What the teacher's output layer is given for one sample.

    Attributes:
        key, mask_S, last_label: as of `Row`.
        hidden_TH: of the supervised positions, on the CPU; what `decode_hidden` gives where it was read.
    """

    key: bytes
    mask_S: np.ndarray
    last_label: int
    hidden_TH: Tensor

    @property
    def tokens(self) -> int:
        return len(self.hidden_TH)


@dataclasses.dataclass(frozen=True)
class Row:
    """What the teacher said about one sample.

    Attributes:
        key: content key of the sample's ids, 16 bytes.
        mask_S: bool, which positions are supervised.
        last_label: label of the last position, `NO_LABEL` if it is not supervised; all other labels are the next id.
        counts_T: int64, entries of each supervised position.
        ids_N: int64, position after position, ascending in each.
        logprobs_N: float32 nats.
        log_tail_XT: float32 nats; [0, T] for sampled rows.
        label_logprob_T: float32 nats, at temperature 1; NaN where it is not known (imported caches).
        top_id_T: int64, the teacher's most likely id.
        entropy_T: float32 nats; None unless sampled.
    """

    key: bytes
    mask_S: np.ndarray
    last_label: int
    counts_T: np.ndarray
    ids_N: np.ndarray
    logprobs_N: np.ndarray
    log_tail_XT: np.ndarray
    label_logprob_T: np.ndarray
    top_id_T: np.ndarray
    entropy_T: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        return len(self.counts_T)


class EncodedRow(NamedTuple):
    """A row as it stands in a shard."""

    key: bytes
    length: int
    tokens: int
    entries: int
    last_label: int
    mask: bytes
    checksum: int
    payload: memoryview


def encode_row(row: Row | HiddenRow, contents: Contents) -> EncodedRow:
    """Raises ValueError for a row that breaks what `Row` and `Contents` say."""
    if contents.hidden_size:
        payload, entries = hidden_payload(row, contents), 0
    else:
        payload, entries = entries_payload(row, contents), len(row.ids_N)
    payload += bytes(-len(payload) % 8)
    mask = zlib.compress(np.packbits(row.mask_S, bitorder="little").tobytes(), 9)
    plain = (row.key, len(row.mask_S), row.tokens, entries, row.last_label, mask)
    return EncodedRow(*plain, row_checksum(*plain, payload), memoryview(payload))


def entries_payload(row: Row, contents: Contents) -> bytes:
    check_row(row, contents)
    parts = [row.log_tail_XT.astype("<f4").tobytes(), row.label_logprob_T.astype("<f4").tobytes()]
    if contents.sampled:
        parts.append(row.entropy_T.astype("<f4").tobytes())
    parts.append(encode_logprobs(row.logprobs_N, row.counts_T, contents.codec, contents.draws))
    parts.append(encode_ids(row.ids_N, row.counts_T, contents.vocab_size))
    parts.append(pack(row.top_id_T, _id_bits(contents)))
    return b"".join(parts)


def hidden_payload(row: HiddenRow, contents: Contents) -> bytes:
    supervised = int(row.mask_S.sum())
    if row.hidden_TH.shape != (supervised, contents.hidden_size):
        raise ValueError(
            f"hidden states {list(row.hidden_TH.shape)} of {supervised} supervised positions and "
            f"{contents.hidden_size} channels cannot be stored"
        )
    return encode_hidden(row.hidden_TH, contents.codec)


def decode_row(
    encoded: EncodedRow, contents: Contents, temperature: float | None = None, *, check: bool = True
) -> Row | HiddenRow:
    """The row of an encoded one; what it is, `contents` says.

    Args:
        temperature: one of the recorded ones; entries are given at it, and log_tail_XT is the one of it, [1, T]. None
            gives entries at the first and the tails of all. Hidden states have none.
        check: compare the checksum first.
    Raises:
        CacheError: the bytes are damaged.
    """
    if check and row_checksum(*encoded[:6], encoded.payload) != encoded.checksum:
        raise damaged("its checksum differs")
    try:
        mask_S = decode_mask(encoded.mask, encoded.length)
        if contents.hidden_size:
            check_size(encoded, contents)
            used = encoded.payload[: part_bytes(encoded.tokens, 0, contents)[0]]
            hidden_TH = decode_hidden(used, contents.codec, encoded.tokens, contents.hidden_size)
            row = HiddenRow(encoded.key, mask_S, encoded.last_label, hidden_TH)
        else:
            row = decode_entries(encoded, contents, mask_S, temperature)
    except (ValueError, IndexError, zlib.error) as error:
        raise damaged(str(error)) from error
    if int(mask_S.sum()) != encoded.tokens:
        raise damaged(f"{int(mask_S.sum())} positions are supervised where {encoded.tokens} are recorded")
    return row


def decode_entries(encoded: EncodedRow, contents: Contents, mask_S: np.ndarray, temperature: float | None) -> Row:
    """As `decode_row`; raises what damaged bytes lead to."""
    tokens, entries = encoded.tokens, encoded.entries
    log_tail_XT, label_logprob_T, entropy_T, logprobs, ids, top_ids = _split(encoded, contents)
    ids_N, counts_T = decode_ids(ids, tokens, entries, contents.vocab_size)
    at = 0 if temperature is None else contents.temperatures.index(temperature)
    log_mass_T = np.zeros(tokens) if contents.sampled else log_mass(log_tail_XT[at])
    scale = contents.temperatures[0] / contents.temperatures[at]
    logprobs_N = decode_logprobs(logprobs, counts_T, contents.codec, log_mass_T, scale)
    top_id_T = unpack(top_ids, tokens, _id_bits(contents)).astype(np.int64)
    if temperature is not None and not contents.sampled:
        log_tail_XT = log_tail_XT[at : at + 1]
    return Row(
        encoded.key, mask_S, encoded.last_label, counts_T, ids_N, logprobs_N, log_tail_XT, label_logprob_T, top_id_T,
        entropy_T,
    )  # fmt: skip


def decode_mask(mask: bytes, length: int) -> np.ndarray:
    """Which of a sample's positions are recorded, bool [S]."""
    return np.unpackbits(np.frombuffer(zlib.decompress(mask), np.uint8), count=length, bitorder="little").view(bool)


def row_checksum(key: bytes, length: int, tokens: int, entries: int, last_label: int, mask: bytes, payload) -> int:
    """CRC-32 of the row's other columns, in the order of the arguments, numbers as little-endian int64."""
    return zlib.crc32(payload, zlib.crc32(key + struct.pack("<4q", length, tokens, entries, last_label) + mask))


def check_row(row: Row, contents: Contents) -> None:
    """Raises ValueError unless the row is what `Row` and `Contents` say; the ids are left to their codec."""
    tokens = len(row.counts_T)
    tails = 0 if contents.sampled else len(contents.temperatures)
    faults = {
        f"{int(row.mask_S.sum())} supervised positions for {tokens} tokens": int(row.mask_S.sum()) != tokens,
        f"tails of shape {row.log_tail_XT.shape}": row.log_tail_XT.shape != (tails, tokens),
        "a label or a most likely id missing": not len(row.label_logprob_T) == len(row.top_id_T) == tokens,
        f"a token of more than {contents.top_k} entries": tokens and row.counts_T.max() > contents.top_k,
        "an entropy where none belongs, or none where one does": (row.entropy_T is not None) != contents.sampled,
        "a log_tail that is NaN or above 0": not (row.log_tail_XT <= 1e-3).all(),
        "a label log-probability above 0": (row.label_logprob_T > 1e-3).any(),
        "a most likely id outside the vocabulary": tokens
        and not 0 <= row.top_id_T.min() <= row.top_id_T.max() < contents.vocab_size,
        "an entropy that is not finite": row.entropy_T is not None and not np.isfinite(row.entropy_T).all(),
    }
    if found := [fault for fault, bad in faults.items() if bad]:
        raise ValueError(f"a row with {', '.join(found)} cannot be stored")


def damaged(reason: str) -> CacheError:
    return CacheError(
        f"a row is damaged: {reason}",
        hint="`megakd cache verify` names every damaged shard; copy those again, or record the cache again",
    )


def _id_bits(contents: Contents) -> int:
    return (contents.vocab_size - 1).bit_length()


def part_bytes(tokens: int, entries: int, contents: Contents) -> list[int]:
    """Bytes of each part of a payload, in order; a part that is absent has 0."""
    if contents.hidden_size:
        return [hidden_bytes(contents.codec, tokens, contents.hidden_size)]
    return [
        0 if contents.sampled else 4 * tokens * len(contents.temperatures),
        4 * tokens,
        4 * tokens if contents.sampled else 0,
        logprobs_bytes(contents.codec, tokens, entries),
        ids_bytes(contents.vocab_size, tokens, entries),
        packed_bytes(tokens, _id_bits(contents)),
    ]


def row_bytes(tokens: int, entries: int, contents: Contents) -> int:
    """Bytes of a payload."""
    used = sum(part_bytes(tokens, entries, contents))
    return used + -used % 8


def check_size(encoded: EncodedRow, contents: Contents) -> None:
    """Raises ValueError unless the payload has as many bytes as its tokens and entries take."""
    size, wanted = len(encoded.payload), row_bytes(encoded.tokens, encoded.entries, contents)
    if size != wanted:
        raise ValueError(
            f"{size} bytes are stored, {encoded.tokens} tokens with {encoded.entries} entries take {wanted}"
        )


def _split(encoded: EncodedRow, contents: Contents) -> tuple:
    """The parts of the payload."""
    check_size(encoded, contents)
    tokens, entries, payload = encoded.tokens, encoded.entries, memoryview(encoded.payload)
    sizes = part_bytes(tokens, entries, contents)
    ends = np.cumsum(sizes).tolist()
    parts = [payload[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    tails = 0 if contents.sampled else len(contents.temperatures)
    log_tail_XT = np.frombuffer(parts[0], "<f4").reshape(tails, tokens)
    entropy_T = np.frombuffer(parts[2], "<f4") if contents.sampled else None
    return log_tail_XT, np.frombuffer(parts[1], "<f4"), entropy_T, *parts[3:]
