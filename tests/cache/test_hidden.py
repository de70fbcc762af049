"""Caches of hidden states: codecs and their bounds, the output layer beside them, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from megakd.cache import (
    CacheReader,
    Contents,
    HiddenRow,
    decode_row,
    encode_row,
    finish,
    publish_head,
    read_head,
    read_header,
    whole_head,
    writing,
)
from megakd.cache.hidden import GROUP, decode_hidden, encode_hidden, hidden_bytes
from megakd.cache.verify import verify
from megakd.errors import CacheError
from megakd.runs.cache_tools import main
from megakd.targets import sample_key
from tests.cache.made import V, make_cache, make_header, make_sample, write_part

H = 71  # a whole group of channels, and a part of one
CONTENTS = Contents(V, 0, (), "bf16", hidden_size=H)


def states(tokens, seed=0, size=H):
    """Like a final norm's: most channels near 1, some far larger."""
    x_TH = torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed))
    return x_TH * torch.logspace(-3, 2, size)


def weight(seed=1):
    return torch.randn(V, H, generator=torch.Generator().manual_seed(seed)).bfloat16()


def make_hidden(folder, samples=range(8), per_part=3, contents=CONTENTS, head=None, **changes):
    """A finished cache of the samples' hidden states."""
    numbers = list(samples)
    parts = [numbers[first : first + per_part] for first in range(0, len(numbers), per_part)]
    header = make_header(contents, len(parts), mode="hidden", tail="none", **changes)
    with writing(folder, header) as whole:
        if whole_head(folder, header) is None:
            publish_head(folder, (weight() if head is None else head).split(50), header, 30.0)
        for part, mine in enumerate(parts):
            if part not in whole:
                write_part(folder, part, [make_row(number) for number in mine], contents)
        return finish(folder, header)


def make_row(number):
    ids, mask_S, last_label = make_sample(number)
    return HiddenRow(sample_key(ids), mask_S, last_label, states(int(mask_S.sum()), number))


def look_up(reader, number, mask_S=None):
    ids, recorded_S, last_label = make_sample(number)
    return reader.table(sample_key(ids), recorded_S if mask_S is None else mask_S, last_label)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 197])
def test_each_codec_keeps_its_bound(size):
    exact_TH = states(13, size=size)
    exact_TH[3] = 0
    exact_TH[4] *= 1e30
    exact_TH[5] *= 1e-38  # less than a normal float32 in places
    for codec, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        content = encode_hidden(exact_TH, codec)
        assert len(content) == hidden_bytes(codec, 13, size) == 13 * size * dtype.itemsize
        assert torch.equal(decode_hidden(content, codec, 13, size), exact_TH.to(dtype))
    content = encode_hidden(exact_TH, "q8")
    assert len(content) == hidden_bytes("q8", 13, size) == 13 * (size + 2 * -(-size // GROUP))
    got_TH = decode_hidden(content, "q8", 13, size)
    for first in range(0, size, GROUP):
        exact, got = (x_TH[:, first : first + GROUP].double() for x_TH in (exact_TH, got_TH))
        step_T1 = exact.abs().amax(1, keepdim=True) / 127 * (1 + 2**-7) + 1e-40
        assert ((got - exact).abs() <= step_T1 / 2 * (1 + 1e-6)).all()


def test_q8_costs_no_more_than_its_bound_says():
    exact_TH, weight_VH = torch.nn.functional.layer_norm(states(50, 3), (H,)).double(), weight().double()
    got_TH = decode_hidden(encode_hidden(exact_TH.float(), "q8"), "q8", 50, H).double()
    steps = [exact_TH[:, at : at + GROUP].abs().amax(1) / 127 * (1 + 2**-7) for at in range(0, H, GROUP)]
    norms = [weight_VH[:, at : at + GROUP].abs().sum(1) for at in range(0, H, GROUP)]
    bound_T = sum(step[:, None] / 2 * norm for step, norm in zip(steps, norms, strict=True)).amax(1)
    P, Q = ((x_TH @ weight_VH.T).log_softmax(1) for x_TH in (exact_TH, got_TH))
    kl_T = (P.exp() * (P - Q)).sum(1)
    assert (kl_T <= bound_T**2 / 2 + 1e-12).all() and 0 < kl_T.mean() < 1e-3


def test_what_is_not_finite_or_of_another_shape_is_not_stored():
    row = make_row(0)
    for hidden_TH, words in [
        (row.hidden_TH * torch.inf, "NaN or infinite cannot be stored"),
        (row.hidden_TH[1:], "cannot be stored"),
        (row.hidden_TH[:, 1:], "cannot be stored"),
    ]:
        with pytest.raises(ValueError, match=words):
            encode_row(dataclasses.replace(row, hidden_TH=hidden_TH), CONTENTS)


def test_a_cache_gives_what_was_stored_and_the_rows_of_any_shard_of_the_head(tmp_path):
    header = make_hidden(tmp_path)
    assert verify(tmp_path) == header and not (tmp_path / "head.json").exists()
    assert json.loads((tmp_path / "cache.json").read_text())["format_version"] == 2
    reader = CacheReader(tmp_path, temperature=1.7, top_k=1000)
    for number in range(8):
        assert torch.equal(look_up(reader, number).hidden_TH, make_row(number).hidden_TH.bfloat16())
    mask_S = make_sample(2)[1].copy()
    mask_S[np.flatnonzero(mask_S)[0]] = False
    assert torch.equal(look_up(reader, 2, mask_S).hidden_TH, make_row(2).hidden_TH[1:].bfloat16())
    for start, stop in ((0, V), (0, 106), (106, V), (V, V)):
        assert torch.equal(read_head(tmp_path, header.head, start, stop), weight()[start:stop])
    assert header.head.softcap == 30 and header.head.dtype == "bf16"


def test_a_cache_of_entries_is_as_it_was_and_a_later_format_is_refused(tmp_path):
    make_cache(tmp_path)
    path = tmp_path / "cache.json"
    record = json.loads(path.read_text())
    assert record["format_version"] == 1 and "head" not in record and "hidden_size" not in record["contents"]
    path.write_text(json.dumps(record | {"format_version": 3}))
    with pytest.raises(CacheError, match=r"has cache format 3, this megakd \(.*\) reads up to 2"):
        CacheReader(tmp_path)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_is_found_wherever_it_is_and_its_file_named(tmp_path):
    header = make_hidden(tmp_path)
    record = header.shards[1]
    for name, at in [("head.bin", 0), ("head.bin", header.head.bytes - 1), (record.file, record.head_bytes + 5)]:
        flip(tmp_path / name, at)
        with pytest.raises(CacheError, match=name):
            verify(tmp_path)
        with pytest.raises(CacheError, match=name):
            if name == "head.bin":
                read_head(tmp_path, header.head, 0, V)
            else:
                look_up(CacheReader(tmp_path), 3)
        flip(tmp_path / name, at)
    verify(tmp_path)
    (tmp_path / "head.bin").write_bytes((tmp_path / "head.bin").read_bytes()[:-2])
    with pytest.raises(CacheError, match=r"output layer in .* is damaged: .*head.bin is \d+ bytes long"):
        verify(tmp_path)


def test_a_lost_output_layer_is_recorded_again_and_nothing_else(tmp_path):
    before = make_hidden(tmp_path)
    (tmp_path / "head.bin").unlink()
    for find in (lambda: read_head(tmp_path, before.head, 0, V), lambda: CacheReader(tmp_path)):
        with pytest.raises(CacheError, match=r"head\.bin"):
            find()
    with writing(tmp_path, make_header(CONTENTS, 3, mode="hidden", tail="none")) as whole:
        assert len(whole) == 3 and not read_header(tmp_path).finished
        with pytest.raises(CacheError, match="lacks the teacher's output layer"):
            finish(tmp_path, make_header(CONTENTS, 3, mode="hidden", tail="none"))
    assert make_hidden(tmp_path) == before == verify(tmp_path)


def test_the_output_layer_of_another_teacher_is_refused(tmp_path):
    from megakd.cache.header import write_header

    header = make_hidden(tmp_path)
    for change, words in [
        ({"teacher_fingerprint": "beef"}, "the output layer of teacher beef, and hidden states of teacher f00d"),
        ({"hidden_size": H + 1}, f"{H + 1} channels, for hidden states of {H} channels"),
        (None, "lists no output layer"),
    ]:
        head = dataclasses.replace(header.head, **change) if change else None
        write_header(tmp_path, dataclasses.replace(header, head=head))
        with pytest.raises(CacheError, match=words):
            CacheReader(tmp_path)
        with pytest.raises(CacheError, match=words):
            verify(tmp_path)


def test_an_output_layer_that_was_left_by_another_teacher_does_not_count(tmp_path):
    header = make_header(CONTENTS, 1, mode="hidden", tail="none")
    with writing(tmp_path, header):
        publish_head(tmp_path, [weight()], header, None)
        assert whole_head(tmp_path, header) is not None
        assert whole_head(tmp_path, dataclasses.replace(header, teacher_fingerprint="beef")) is None


def test_recordings_of_one_teacher_are_merged_and_of_two_not(tmp_path, capsys):
    make_hidden(tmp_path / "a", range(5))
    make_hidden(tmp_path / "b", range(5, 8))
    make_hidden(tmp_path / "c", range(5, 8), head=weight(2))
    main(["merge", "--output", str(tmp_path / "ab"), str(tmp_path / "a"), str(tmp_path / "b")])
    header, reader = verify(tmp_path / "ab"), CacheReader(tmp_path / "ab")
    assert header.head == read_header(tmp_path / "a").head and len(reader) == 8
    for number in range(8):
        assert torch.equal(look_up(reader, number).hidden_TH, make_row(number).hidden_TH.bfloat16())
    with pytest.raises(CacheError, match="cannot be one cache: head is"):
        main(["merge", "--output", str(tmp_path / "ac"), str(tmp_path / "a"), str(tmp_path / "c")])
    flip(tmp_path / "a" / "head.bin", 99)
    with pytest.raises(CacheError, match=r"a/head\.bin is damaged"):
        main(["merge", "--output", str(tmp_path / "again"), str(tmp_path / "a"), str(tmp_path / "b")])
    capsys.readouterr()


def test_stat_says_the_bytes_of_a_token_and_of_the_output_layer(tmp_path, capsys):
    header = make_hidden(tmp_path)
    main(["stat", str(tmp_path)])
    said = capsys.readouterr().out
    assert f"hidden, {H} channels a token ({2 * H} bytes), codec bf16" in said and "temperature   any" in said
    assert f"output layer  {V} x {H} in bf16, soft cap 30, {2 * V * H:,} bytes, once" in said
    files = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert f"{files:,}, {(files - 2 * V * H) / header.tokens:.1f} a token beside the output layer" in said
    with pytest.raises(CacheError, match="no mass is missing"):
        main(["stat", str(tmp_path), "--plot", str(tmp_path / "mass.png")])
    with pytest.raises(CacheError, match=r"recorded with cache\.mode=hidden; NeMo-Aligner's format"):
        main(["export", str(tmp_path), "--data", "unused", "--output", "unused"])


def test_a_decoded_row_is_what_was_encoded_with_every_codec():
    row = make_row(4)
    for codec in ("bf16", "fp32", "q8"):
        contents = dataclasses.replace(CONTENTS, codec=codec)
        got = decode_row(encode_row(row, contents), contents, 3.0)
        assert got.key == row.key and (got.mask_S == row.mask_S).all() and got.last_label == row.last_label
        assert torch.equal(got.hidden_TH, decode_hidden(encode_hidden(row.hidden_TH, codec), codec, row.tokens, H))
