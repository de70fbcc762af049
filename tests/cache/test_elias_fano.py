import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.cache.bits import pack, packed_bytes, unpack
from megakd.cache.elias_fano import decode_ids, encode_ids, ids_bytes, low_bits


@given(st.integers(1, 40).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=70))))
@settings(max_examples=150, deadline=None)
def test_planes_give_back_every_number(case):
    bits, values = case
    packed = pack(np.array(values, np.uint64), bits)
    assert len(packed) == packed_bytes(len(values), bits)
    assert unpack(packed, len(values), bits).tolist() == values


@st.composite
def samples(draw):
    """(vocab_size, ids of each token): ragged or uniform counts, empty tokens, whole vocabularies."""
    vocab_size = draw(st.sampled_from([1, 2, 7, 64, 1000, 131072, 151936, 2**24]))
    most = min(vocab_size, 70)
    uniform = draw(st.one_of(st.none(), st.integers(0, most)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    clustered = draw(st.booleans())  # all ids in one corner of the vocabulary
    span = min(vocab_size, 100) if clustered else vocab_size
    tokens = []
    for _ in range(draw(st.integers(0, 9))):
        count = draw(st.integers(0, most)) if uniform is None else uniform
        first = draw(st.sampled_from([0, vocab_size - span]))
        tokens.append(first + np.sort(generator.choice(span, min(count, span), replace=False)))
    return vocab_size, tokens


@given(samples())
@settings(max_examples=300, deadline=None)
def test_ids_come_back_whatever_their_number_and_vocabulary(sample):
    vocab_size, tokens = sample
    counts_T = np.array([len(ids) for ids in tokens], np.int64)
    ids_N = np.concatenate([*tokens, np.empty(0, np.int64)]).astype(np.int64)
    packed = encode_ids(ids_N, counts_T, vocab_size)
    assert len(packed) == ids_bytes(vocab_size, len(tokens), len(ids_N))
    got_ids_N, got_counts_T = decode_ids(packed, len(tokens), len(ids_N), vocab_size)
    assert got_counts_T.tolist() == counts_T.tolist()
    assert got_ids_N.tolist() == ids_N.tolist()


def test_a_mean_count_that_is_whole_does_not_pass_for_a_uniform_one():
    counts_T, ids_N = np.array([1, 3]), np.array([5, 0, 6, 7])
    ids, counts = decode_ids(encode_ids(ids_N, counts_T, 8), 2, 4, 8)
    assert (ids.tolist(), counts.tolist()) == ([5, 0, 6, 7], [1, 3])


def test_64_of_131072_ids_take_104_bytes_a_token():
    assert low_bits(131072, 4096, 4096 * 64) == 11
    assert ids_bytes(131072, 4096, 4096 * 64) == 104 * 4096
    assert low_bits(131072, 4096, 1) == 17  # no more bits than an id has, however few tokens have an entry


def test_whole_vocabulary_takes_two_bits_an_id():
    assert ids_bytes(1000, 8, 8 * 1000) == 2000


@pytest.mark.parametrize(
    ("ids", "counts", "word"),
    [
        ([3, 3], [2], "ascend"),
        ([5, 4], [2], "ascend"),
        ([8], [1], "must be in"),
        ([-1], [1], "must be in"),
        ([1], [2], "sum"),
    ],
)
def test_ids_that_cannot_be_stored_are_refused(ids, counts, word):
    with pytest.raises(ValueError, match=word):
        encode_ids(np.array(ids, np.int64), np.array(counts), 8)


def test_a_lost_bit_and_an_id_beyond_the_vocabulary_are_noticed():
    counts_T, ids_N = np.array([2, 2]), np.array([1, 5, 2, 4])
    packed = bytearray(encode_ids(ids_N, counts_T, 6))
    packed[-1] ^= packed[-1] & -packed[-1]
    with pytest.raises(ValueError, match="entries are coded"):
        decode_ids(bytes(packed), 2, 4, 6)
    top = bytearray(encode_ids(np.array([4]), np.array([1]), 5))  # 5 ids, 2 low bits: setting one makes id 5
    top[0] |= 1
    with pytest.raises(ValueError, match="id 5"):
        decode_ids(bytes(top), 1, 1, 5)
