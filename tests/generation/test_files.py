"""`megakd generate` to a file: the same at any layout, whole after a kill, read by `megakd train` as it is."""

import json
import os
import signal
import time

import pytest

from megakd.errors import ConfigError
from tests import forked
from tests.ranks import run_ranks
from tests.training import runs

PROMPTS = ["def main(", "import", "class Verb:", '    """The ', "raise ConfigError", "return", "for name in", "x = "]
DRAWN = ("--temperature", "1.1", "--top-p", "0.95", "--n", "3", "--max-new-tokens", "9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    runs.prepare(folder)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return folder


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("model")
    assert run_ranks(2, runs.train, runs.values(folder, run_dir, train__steps=30)) == [None, None]
    return run_dir


def start(ranks, model, *flags):
    arguments = ["generate", "--checkpoint", model, "--device", "cpu", *flags]
    return forked.by_hand(ranks, "megakd.cli", *arguments, environment=runs.ENVIRONMENT, together=True)


def generate(ranks, model, *flags, fails=False):
    """What the ranks print, rank by rank."""
    launch = start(ranks, model, *flags)
    printed = [process.communicate(120)[0] for process in launch]
    assert all((process.returncode != 0) == fails for process in launch), printed
    return printed


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_rounding(entries):
    return [{k: v for k, v in entry.items() if k != "logprobs"} for entry in entries]


def test_a_file_is_the_same_at_any_layout_and_batch_size(folder, model, tmp_path):
    source = ("--input", folder / "prompts.jsonl")
    generate(1, model, *source, *DRAWN, "--output", tmp_path / "alone.jsonl", "--batch-size", "1")
    alone = lines(tmp_path / "alone.jsonl")
    places = [(entry["prompt_number"], entry["completion_number"]) for entry in alone]
    assert places == [(p, c) for p in range(len(PROMPTS)) for c in range(3)]
    assert len({entry["completion"] for entry in alone}) > 2 * len(PROMPTS), "completions of a prompt differ"
    assert {path.name for path in tmp_path.iterdir()} == {"alone.jsonl", "alone.jsonl.info.json"}
    for name, ranks, flags in (
        ("batch", 1, ["--batch-size", "7"]),
        ("dp", 2, []),
        ("tp", 2, ["--tp", "2"]),
        ("pp_dp", 4, ["--pp", "2", "--batch-size", "2"]),
    ):
        generate(ranks, model, *source, *DRAWN, "--output", tmp_path / f"{name}.jsonl", *flags)
        other = lines(tmp_path / f"{name}.jsonl")
        assert without_rounding(other) == without_rounding(alone), name
        for a, b in zip(other, alone, strict=True):
            assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)
    shards = []
    for index in range(3):
        shard = (*DRAWN, "--shard", f"{index}/3", "--limit", "7")
        generate(1, model, *source, *shard, "--output", tmp_path / f"shard{index}.jsonl")
        shards += lines(tmp_path / f"shard{index}.jsonl")
    shards.sort(key=lambda entry: (entry["prompt_number"], entry["completion_number"]))
    assert without_rounding(shards) == without_rounding(alone[: 7 * 3])


@pytest.mark.slow
def test_a_killed_launch_goes_on(folder, model, tmp_path):
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"prompt": f"{text}{n}"}) + "\n" for n in range(12) for text in PROMPTS))
    flags = ("--input", many, *DRAWN, "--output", tmp_path / "out.jsonl", "--batch-size", "3")
    generate(1, model, *flags[:-3], tmp_path / "whole.jsonl", "--batch-size", "16")
    parts, kills = tmp_path / "out.jsonl.parts", 0
    for least in (1, 15_000, 30_000):
        launch = start(2, model, *flags, "--batch-size", "1")
        deadline = time.monotonic() + 60
        while sum(file.stat().st_size for file in parts.glob("*.part")) < least and time.monotonic() < deadline:
            time.sleep(0.001)
        for process in launch:
            os.kill(process.pid, signal.SIGKILL)
        for process in launch:
            process.wait(30)
        kills += any(process.returncode == -signal.SIGKILL for process in launch)
        assert not (tmp_path / "out.jsonl").exists()
    assert kills == 3
    torn = sorted(parts.glob("*.part"))[0]
    with torn.open("ab") as file:
        file.write(b'{"prompt_number": 3, "compl')  # a line that a kill has cut off
    refused = "".join(generate(2, model, *flags, "--seed", "5", fails=True))  # the first rank to say it says it in full
    assert "begun with other settings" in refused and "seed: was 1234, is 5" in refused
    generate(4, model, *flags, "--tp", "2")
    assert without_rounding(lines(tmp_path / "out.jsonl")) == without_rounding(lines(tmp_path / "whole.jsonl"))
    assert not parts.exists()
    there = tmp_path / "there"
    again = generate(2, model, *flags, "--upload", f"file://{there}/")
    assert "is there already" in again[0] and f"are at file://{there}/out.jsonl" in again[0]
    assert (there / "out.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert "was 9, is 8" in generate(1, model, *flags, "--max-new-tokens", "8", fails=True)[0]
    info = json.loads((tmp_path / "out.jsonl.info.json").read_text())
    assert info["completions"] == 12 * len(PROMPTS) * 3


def test_train_reads_the_ids_that_were_written(folder, model, tmp_path):
    """The labels are the written tokens; another tokenizer, and ids that are none, are refused by name."""
    import numpy as np

    from megakd.config import Data
    from megakd.data.sources import open_data
    from megakd.data.tokenizers.load import load_tokenizer
    from megakd.errors import DataError

    output = tmp_path / "out.jsonl"
    generate(1, model, "--input", folder / "prompts.jsonl", *DRAWN, "--output", output)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    data = Data(train=str(output), sequence_length=64)
    dataset = open_data(data, data.train, tokenizer, seed=1, progress=False)
    entries = lines(output)
    assert len(dataset) == len(entries)
    for index, entry in enumerate(entries):
        sample, asked = dataset.sample(0, index), len(entry["prompt_ids"])
        whole = entry["prompt_ids"] + entry["completion_ids"]
        assert sample["ids"].tolist() == whole[:-1]
        assert sample["labels"][asked - 1 :].tolist() == entry["completion_ids"]
        assert np.all(sample["labels"][: asked - 1] == -100)
        assert entry["completion"] == tokenizer.decode(entry["completion_ids"])
    assert run_ranks(1, runs.train, runs.values(folder, tmp_path / "run", data__train=str(output), train__steps=2)) == [
        None
    ]
    entries[4]["tokenizer"], entries[5]["completion_ids"] = "0123456789ab", [3, 400]
    entries[6]["completion_ids"] = []
    output.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with pytest.raises(DataError) as refused:
        open_data(data, data.train, tokenizer, seed=1, progress=False)
    assert "those of tokenizer '0123456789ab'" in str(refused.value) and "holds 400" in str(refused.value)
    assert "3 records" in str(refused.value) and '"completion_ids" is empty' in str(refused.value)


def test_what_ends_a_completion(folder, model, tmp_path):
    source = ("--input", folder / "prompts.jsonl", "--max-new-tokens", "20", "--temperature", "1")
    generate(1, model, *source, "--output", tmp_path / "plain.jsonl")
    plain = lines(tmp_path / "plain.jsonl")
    token = plain[0]["completion_ids"][4]
    text = plain[1]["completion"][3:6]
    generate(1, model, *source, "--output", tmp_path / "token.jsonl", "--stop-token", token)
    generate(1, model, *source, "--output", tmp_path / "text.jsonl", "--stop", text, "--stop", "no such text")
    eos = 2
    for name, stop in (("token", token), ("text", text)):
        ended = lines(tmp_path / f"{name}.jsonl")
        for before, after in zip(plain, ended, strict=True):
            ids = after["completion_ids"]
            assert ids == before["completion_ids"][: len(ids)], "a stop changes nothing before it"
            assert text not in after["completion"] if name == "text" else token not in ids[:-1]
            assert after["finish_reason"] == ("stop" if after["stop"] is not None else "length")
            assert len(ids) == 20 if after["stop"] is None else after["stop"] in (stop, eos)
            assert before["completion"].startswith(after["completion"])
        assert ended[name == "text"]["stop"] == stop
    assert ended[1]["completion"] == plain[1]["completion"][:3]


def test_prompts_that_do_not_fit_and_records_that_are_none(folder, model, tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "def"}\n{"prompt": "' + "def " * 40 + '"}\n{"prompt": ""}\n{"pormpt": "x"}\nnone\n')
    flags = ("--input", source, "--output", tmp_path / "out.jsonl", "--max-new-tokens", "4")
    refused = generate(1, model, *flags, fails=True)[0]
    assert "2 records of the input cannot be used" in refused and ":4: " in refused and ":5: broken JSON" in refused
    printed = generate(2, model, *flags, "--on-error", "skip")[0]
    assert [entry["prompt_number"] for entry in lines(tmp_path / "out.jsonl")] == [0]
    assert "1 prompts of more than 28 tokens" in printed and "1 prompts without a token" in printed
    assert "2 records that cannot be used" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n", "0", "--temperature", "1"], "--n 0: expected 1 or more"),
        (["--temperature", "-1"], "--temperature -1.0: expected 0"),
        (["--top-p", "1.5", "--temperature", "1"], "--top-p 1.5: expected more than 0"),
        (["--top-k", "5"], "without effect at --temperature 0"),
        (["--raw"], "--raw has no effect with --input"),
        (["--upload", "bucket/name"], "--upload bucket/name is no address"),
        (["--n", "2"], "2 equal completions"),
        (["--max-new-tokens", "32"], "leaves no room for a prompt"),
        (["--stop-token", "two tokens"], "is no token of"),
        (["--stop-token", "400"], "is no id of"),
        (["--stop", ""], "--stop is empty"),
        (["--tp", "2"], "are 2 ranks, 1 were started"),
        (["--format", "messages", "--max-new-tokens", "9"], "no chat template"),
    ],
)
def test_refusals(folder, model, tmp_path, flags, message):
    given = ("--input", folder / "prompts.jsonl", "--output", tmp_path / "out.jsonl", *flags)
    (printed,) = generate(1, model, *given, fails=True)
    assert (message in printed and "Traceback" not in printed and "hint:" in printed) or "expected" in message
    assert not list(tmp_path.iterdir())


def test_an_empty_input_and_a_file_that_is_another_s(folder, model, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    flags = ("--input", tmp_path / "empty.jsonl", "--output", tmp_path / "out.jsonl", "--max-new-tokens", "9")
    assert "holds no record" in generate(1, model, *flags, fails=True)[0]
    (tmp_path / "out.jsonl").write_text("mine\n")
    flags = ("--input", folder / "prompts.jsonl", "--output", tmp_path / "out.jsonl", "--max-new-tokens", "9")
    assert "exists already" in generate(1, model, *flags, fails=True)[0]
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize(
    "flags", [["--shard", "1/2"], ["--limit", "3"], ["--format", "alpaca"], ["--column", "input=q"]]
)
def test_flags_about_records_are_refused_with_one_prompt(flags):
    from megakd.runs.generate import build_parser, check

    with pytest.raises(ConfigError, match=f"{flags[0]} has no effect with --prompt"):
        check(build_parser().parse_args(["--checkpoint", "x", "--prompt", "y", *flags]))
