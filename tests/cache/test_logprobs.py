import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megakd.cache.logprobs import decode_logprobs, encode_logprobs, log_mass, logprobs_bytes

ROUNDING = 2e-6  # float32, relative to numbers of a few nats


def spread_of(logs, counts):
    """Largest distance from a token's maximum, of each token."""
    return np.array([part.max() - part.min() if len(part) else 0 for part in np.split(logs, np.cumsum(counts)[:-1])])


def bound(codec, ranges):
    if codec == "fp32":
        return np.zeros_like(ranges)
    if codec == "fp16":
        return 2 * np.maximum(ranges * 2**-11, 2**-25)
    up = ranges.astype(np.float16)
    return np.where(up < ranges, np.nextafter(up, np.float16(np.inf)), up).astype(np.float64) / 255


@st.composite
def distributions(draw):
    """(logprobs of all tokens, counts, log_tail): any spread, equal entries, a tail of everything or nothing."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    width = draw(st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 12.0, 90.0, 4000.0]))
    log_tail = draw(st.sampled_from([-np.inf, -1e-5, -0.1, -0.7, -3.0, -20.0, -80.0]))
    ragged = draw(st.booleans())
    most = draw(st.sampled_from([1, 2, 64, 97]))
    counts = generator.integers(1, most + 1, 5) if ragged else np.full(5, most)
    logs = [generator.random(count) * -width for count in counts]
    mass = -np.expm1(log_tail)
    logs = [row - row.max() for row in logs]
    logs = [row - np.log(np.exp(row).sum()) + np.log(mass) for row in logs]
    return np.concatenate(logs).astype(np.float32), counts, np.full(5, log_tail)


@given(distributions(), st.sampled_from(["fp32", "fp16", "q8"]))
@settings(max_examples=300, deadline=None)
def test_every_codec_keeps_its_bound_and_the_mass(case, codec):
    logs_N, counts_T, log_tail_T = case
    packed = encode_logprobs(logs_N, counts_T, codec)
    assert len(packed) == logprobs_bytes(codec, len(counts_T), len(logs_N))
    got_N = decode_logprobs(packed, counts_T, codec, log_mass(log_tail_T))
    ranges_T = spread_of(logs_N.astype(np.float64), counts_T)
    allowed_T = bound(codec, ranges_T) + ROUNDING * (1 + ranges_T)
    wrong_T = np.array([np.abs(p).max() for p in np.split(got_N - logs_N, np.cumsum(counts_T)[:-1])])
    assert (wrong_T <= allowed_T).all(), (codec, wrong_T, allowed_T)
    for exact, got, allowed in zip(
        *(np.split(x, np.cumsum(counts_T)[:-1]) for x in (logs_N, got_N)), allowed_T, strict=True
    ):
        distance_wrong = np.abs((got.max() - got) - (exact.max() - exact))
        assert (distance_wrong <= allowed / 2 + ROUNDING * (1 + np.ptp(exact))).all()
        assert (np.diff(got[np.argsort(exact, kind="stable")]) >= 0).all(), "the order of the entries changed"
    mass_T = np.array([np.exp(p.astype(np.float64)).sum() for p in np.split(got_N, np.cumsum(counts_T)[:-1])])
    np.testing.assert_allclose(mass_T, -np.expm1(log_tail_T), rtol=3e-6)


@given(distributions())
@settings(max_examples=100, deadline=None)
def test_q8_keeps_the_stated_bound_on_the_divergence(case):
    logs_N, counts_T, log_tail_T = case
    got_N = decode_logprobs(encode_logprobs(logs_N, counts_T, "q8"), counts_T, "q8", log_mass(log_tail_T))
    exact_N = logs_N.astype(np.float64)
    kl_T = [part.sum() for part in np.split(np.exp(exact_N) * (exact_N - got_N), np.cumsum(counts_T)[:-1])]
    ranges_T = spread_of(exact_N, counts_T)
    assert (np.array(kl_T) <= bound("q8", ranges_T) ** 2 / 8 + ROUNDING * (1 + ranges_T)).all()


@pytest.mark.parametrize("codec", ["fp32", "fp16", "q8"])
def test_another_temperature_is_the_softmax_at_it(codec):
    logits = np.random.default_rng(1).normal(0, 4, (3, 50))

    def entries(temperature):
        logs = logits / temperature
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        return logs[:, :20].ravel().astype(np.float32), np.log(np.exp(logs[:, 20:]).sum(1))

    base_N, _ = entries(1.5)
    want_N, tail_T = entries(4.0)
    counts_T = np.full(3, 20)
    got_N = decode_logprobs(encode_logprobs(base_N, counts_T, codec), counts_T, codec, log_mass(tail_T), 1.5 / 4)
    np.testing.assert_allclose(got_N, want_N, atol={"fp32": 1e-5, "fp16": 5e-3, "q8": 0.05}[codec])


@example([255, 1], 256)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=20), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_counts_come_back_exactly(counts, _):
    draws = sum(counts)
    codec = "count8" if max(counts) < 256 else "count16"
    logs_N = np.log(np.array(counts) / draws).astype(np.float32)
    packed = encode_logprobs(logs_N, np.array([len(counts)]), codec, draws)
    assert np.frombuffer(packed, "u1" if codec == "count8" else "<u2").tolist() == counts
    np.testing.assert_allclose(decode_logprobs(packed, np.array([len(counts)]), codec, np.zeros(1)), logs_N, atol=2e-6)


def test_entries_nearly_impossible_stay_finite_and_ordered():
    logs_N = np.array([0.0, -5e4, -3e5], np.float32)
    for codec in ("fp16", "q8"):
        got_N = decode_logprobs(encode_logprobs(logs_N, np.array([3]), codec), np.array([3]), codec, np.zeros(1))
        assert np.isfinite(got_N).all() and got_N[0] == 0 and got_N[2] <= got_N[1] < -4e4


@pytest.mark.parametrize(("codec", "value"), [("fp32", np.nan), ("q8", -np.inf), ("fp16", np.inf), ("count8", -0.1)])
def test_what_cannot_be_stored_is_refused(codec, value):
    with pytest.raises(ValueError, match=r"finite|no count"):
        encode_logprobs(np.array([value], np.float32), np.array([1]), codec, draws=10)


def test_mass_beside_a_tail_of_almost_everything():
    tail = np.float32(np.log1p(-1e-6))
    np.testing.assert_allclose(np.exp(log_mass(np.array([tail]))), 1e-6, rtol=1e-6)
    assert log_mass(np.array([-np.inf]))[0] == 0


@pytest.mark.parametrize("codec", ["fp32", "fp16", "q8"])
def test_an_entry_beside_a_tail_of_everything_has_a_finite_logarithm(codec):
    """keep_label with K = 1 stores a label of any probability; float32's tail of it is 0."""
    logs_N = np.array([-80.0], np.float32)
    got_N = decode_logprobs(encode_logprobs(logs_N, np.array([1]), codec), np.array([1]), codec, log_mass(np.zeros(1)))
    assert np.isfinite(got_N).all() and got_N[0] < -79
