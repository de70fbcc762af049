import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.cache import Contents, Row, build_table, decode_row, encode_row
from megakd.errors import CacheError
from megakd.targets import sample_key
from tests.cache.made import CONTENTS, V, log_softmax, make_logits, make_row

SAMPLED = Contents(vocab_size=V, top_k=5, temperatures=(1.0,), codec="count8", sampled=True, draws=20)
CODECS = {"fp32": 0, "fp16": 0.01, "q8": 0.04}


def assert_same(got, want, atol=0.0):
    for field in dataclasses.fields(want):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if field.name == "logprobs_N":
            np.testing.assert_allclose(a, b, atol=atol)
        elif isinstance(b, np.ndarray):
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        else:
            assert a == b, field.name


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("codec", CODECS)
def test_a_row_comes_back(codec, ragged):
    contents = dataclasses.replace(CONTENTS, codec=codec)
    row = make_row(3, contents, ragged=ragged)
    assert_same(decode_row(encode_row(row, contents), contents), row, CODECS[codec])


@st.composite
def recordings(draw):
    """(contents, row): any vocabulary, numbers of entries, temperatures; equal entries; all or hardly any mass kept."""
    vocab_size = draw(st.sampled_from([1, 2, 17, 1000, 151936, 2**24]))
    temperatures = draw(st.sampled_from([(1.0,), (2.0, 1.0, 0.5)]))
    codec, width = draw(st.sampled_from(sorted(CODECS))), draw(st.sampled_from([0.0, 3.0, 60.0]))
    top_k = draw(st.sampled_from([k for k in (1, 2, 17, 64) if k <= vocab_size]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    tokens, length = draw(st.integers(0, 4)), draw(st.integers(4, 9))
    mask_S = np.isin(np.arange(length), generator.choice(length, tokens, replace=False))
    counts_T = generator.integers(1, top_k + 1, tokens) if draw(st.booleans()) else np.full(tokens, top_k)
    log_tail = -np.inf if top_k == vocab_size else draw(st.sampled_from([-60.0, -1.0, -1e-7]))
    ids, logprobs = [], []
    for count in counts_T:
        logs = generator.random(count) * -width
        logprobs.append(logs - np.log(np.exp(logs).sum()) + np.log(-np.expm1(np.float32(log_tail).astype(float))))
        ids.append(np.sort(generator.choice(vocab_size, count, replace=False)))
    row = Row(
        key=generator.bytes(16),
        mask_S=mask_S,
        last_label=3 if mask_S[-1] else -1,
        counts_T=counts_T,
        ids_N=np.concatenate([*ids, np.empty(0)]).astype(np.int64),
        logprobs_N=np.concatenate([*logprobs, np.empty(0)]).astype(np.float32),
        log_tail_XT=np.full((len(temperatures), tokens), log_tail, np.float32),
        label_logprob_T=generator.normal(-5, 1, tokens).clip(max=0).astype(np.float32),
        top_id_T=generator.integers(0, vocab_size, tokens),
    )
    return Contents(vocab_size, top_k, temperatures, codec), row


@given(recordings())
@settings(max_examples=200, deadline=None)
def test_any_row_comes_back_and_is_a_distribution_at_every_temperature(recording):
    contents, row = recording
    encoded = encode_row(row, contents)
    assert_same(decode_row(encoded, contents), row, {"fp32": 0, "fp16": 0.07, "q8": 0.5}[contents.codec])
    for temperature in contents.temperatures:
        table = build_table(decode_row(encoded, contents, temperature))
        mass_T = np.exp(table.logprobs_TK.astype(float)).sum(1) + np.exp(table.log_tail_T.astype(float))
        np.testing.assert_allclose(mass_T, 1, rtol=1e-5)
        assert (table.ids_TK >= 0).sum(1).tolist() == row.counts_T.tolist()


def test_a_sampled_row_comes_back():
    row = make_row(3, SAMPLED)
    assert_same(decode_row(encode_row(row, SAMPLED), SAMPLED), row, atol=2e-6)


def test_a_row_without_supervised_positions_comes_back():
    ids = np.arange(9)
    row = make_row(0, sample=(ids, np.zeros(9, bool), -1))
    assert_same(decode_row(encode_row(row, CONTENTS), CONTENTS), row)
    assert build_table(row).ids_TK.shape == (0, 0)


@pytest.mark.parametrize("codec", CODECS)
def test_every_recorded_temperature_is_the_teacher_at_it(codec):
    contents = dataclasses.replace(CONTENTS, codec=codec, temperatures=(1.5, 0.5, 4.0))
    row = make_row(2, contents)
    for temperature in contents.temperatures:
        got = build_table(decode_row(encode_row(row, contents), contents, temperature))
        want = log_softmax(make_logits(2, len(row.counts_T)) / temperature)
        np.testing.assert_allclose(
            got.logprobs_TK, np.take_along_axis(want, got.ids_TK, 1), atol=max(3 * CODECS[codec], 1e-5)
        )
        np.put_along_axis(want, got.ids_TK, -np.inf, 1)
        np.testing.assert_allclose(got.log_tail_T, np.log(np.exp(want).sum(1)), atol=1e-5)


@pytest.mark.parametrize("ragged", [False, True])
def test_fewer_entries_are_the_most_likely_ones_and_the_tail_takes_the_rest(ragged):
    row = make_row(4, ragged=ragged)
    whole, table = build_table(row), build_table(row, 3)
    for t, count in enumerate(row.counts_T):
        order = np.argsort(-whole.logprobs_TK[t, :count], kind="stable")
        kept = np.sort(order[:3])
        assert table.ids_TK[t, : min(count, 3)].tolist() == whole.ids_TK[t, kept].tolist()
        mass = np.exp(table.logprobs_TK[t].astype(np.float64)).sum() + np.exp(float(table.log_tail_T[t]))
        assert abs(mass - 1) < 1e-6


def test_among_equal_entries_the_lower_ids_are_kept():
    row = make_row(0)
    equal = dataclasses.replace(row, logprobs_N=np.full_like(row.logprobs_N, np.log(1 / 8)))
    assert build_table(equal, 2).ids_TK.tolist() == build_table(row).ids_TK[:, :2].tolist()


def test_draws_cannot_be_cut_to_the_most_likely():
    with pytest.raises(CacheError, match=r"no sample\nhint: leave loss\.top_k"):
        build_table(make_row(0, SAMPLED), 3)


@pytest.mark.parametrize("field", ["key", "length", "last_label", "mask", "payload", "checksum"])
def test_a_change_of_any_column_is_noticed(field):
    encoded = encode_row(make_row(1), CONTENTS)
    value = getattr(encoded, field)
    if isinstance(value, int):
        changed = value ^ 1
    else:
        changed = bytearray(value)
        changed[len(changed) // 2] ^= 4
    with pytest.raises(CacheError, match="damaged: its checksum differs"):
        decode_row(encoded._replace(**{field: changed}), CONTENTS)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(mask_S=np.ones(5, bool)), "supervised positions"),
        (dict(log_tail_XT=np.zeros((1, 3), np.float32)), "tails of shape"),
        (dict(entropy_T=np.zeros(3, np.float32)), "entropy"),
        (dict(top_id_T=np.full(100, V)), "most likely id"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(change, word):
    with pytest.raises(ValueError, match=word):
        encode_row(dataclasses.replace(make_row(1), **change), CONTENTS)


def test_a_nan_tail_and_too_many_entries_are_refused():
    row = make_row(1)
    with pytest.raises(ValueError, match="log_tail that is NaN"):
        encode_row(dataclasses.replace(row, log_tail_XT=row.log_tail_XT * np.nan), CONTENTS)
    with pytest.raises(ValueError, match="more than 3 entries"):
        encode_row(row, dataclasses.replace(CONTENTS, top_k=3))


def test_the_key_is_that_of_the_format():
    assert sample_key([1, 2, 131071]).hex() == sample_key(np.array([1, 2, 131071], np.int32)).hex()
    assert sample_key([1, 2, 131071]).hex() == "2d498953495c07494b3f6f9a646df8ec"
    assert sample_key([1, 2]) != sample_key([1, 2, 0])
