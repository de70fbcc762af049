"""lm-eval's tasks through the adapter, from local files, against transformers on the exported model."""

import json

import pytest

from tests.ranks import run_ranks
from tests.training import runs

pytest.importorskip("lm_eval", reason='pip install "megakd[eval]"')

DOCUMENTS = [
    {"text": "def main(", "choices": ["argv)", " return", ":"], "answer": 0},
    {"text": "raise ConfigError", "choices": ["(", " import os", "\n\n\n"], "answer": 0},
    {"text": "import", "choices": [" json", " argparse", "class"], "answer": 1},
    {"text": "for name in", "choices": [" names", " x"], "answer": 1},
    {"text": "    return", "choices": [" 0", " None", " self"], "answer": 2},
]
TASKS = {
    "choose": {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": "answer",
               "doc_to_choice": "choices", "target_delimiter": "", "metric_list": [{"metric": "acc"}]},
    "likely": {"output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": "{{choices[0]}}",
               "target_delimiter": "", "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]},
    "write": {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{choices[0]}}",
              "generation_kwargs": {"until": [")", "\n"], "max_gen_toks": 6},
              "metric_list": [{"metric": "exact_match"}]},
    "read": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
             "metric_list": [{"metric": "bits_per_byte"}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    runs.prepare(folder)
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "test_split": "test",
                "dataset_kwargs": {"data_files": {"test": str(tasks / "documents.jsonl")}}}  # fmt: skip
        (tasks / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("model")
    assert run_ranks(2, runs.train, runs.values(folder, run_dir, train__steps=30)) == [None, None]
    return run_dir


def by_transformers(folder, model, tmp_path):
    """What the tasks' metrics are of the exported model, written out."""
    import torch
    import transformers

    from megakd.converters.convert import Options, convert
    from megakd.converters.direct import find_checkpoint
    from megakd.data.tokenizers.load import load_tokenizer

    convert(find_checkpoint(model), tmp_path / "hf", "hf", Options(progress=False))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder / "tokenizer.model")

    @torch.no_grad()
    def score(context, continuation):
        asked, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
        logprobs = theirs(torch.tensor([whole])).logits[0, :, : runs.PIECES].double().log_softmax(1)
        rows = range(len(asked) - 1, len(whole) - 1)
        greedy = all(int(logprobs[row].argmax()) == whole[row + 1] for row in rows)
        return sum(float(logprobs[row, whole[row + 1]]) for row in rows), greedy

    @torch.no_grad()
    def write(context):
        ids, text = tokenizer.encode(context), ""
        start = len(ids)
        while len(ids) < start + 6:
            token = int(theirs(torch.tensor([ids])).logits[0, -1, : runs.PIECES].argmax())
            ids.append(token)
            text = tokenizer.decode(ids[start:])
            if token == tokenizer.eos_id or ")" in text or "\n" in text:
                break
        return min((text.partition(stop)[0] for stop in (")", "\n")), key=len)

    @torch.no_grad()
    def read(text):
        ids = [tokenizer.eos_id, *tokenizer.encode(text)]
        logprobs = theirs(torch.tensor([ids])).logits[0, :, : runs.PIECES].double().log_softmax(1)
        return sum(float(logprobs[row, ids[row + 1]]) for row in range(len(ids) - 1))

    pairs = [[score(d["text"], choice) for choice in d["choices"]] for d in DOCUMENTS]
    chosen = [max(range(len(scores)), key=lambda i, s=scores: s[i][0]) for scores in pairs]
    count = len(DOCUMENTS)
    mean = sum(scores[0][0] for scores in pairs) / count
    size = sum(len(d["text"].encode()) for d in DOCUMENTS)
    return {
        ("choose", "acc,none"): sum(c == d["answer"] for c, d in zip(chosen, DOCUMENTS, strict=True)) / count,
        ("likely", "perplexity,none"): 2.718281828459045**-mean,
        ("likely", "acc,none"): sum(scores[0][1] for scores in pairs) / count,
        ("write", "exact_match,none"): sum(write(d["text"]) == d["choices"][0] for d in DOCUMENTS) / count,
        ("read", "bits_per_byte,none"): -sum(read(d["text"]) for d in DOCUMENTS) / size / 0.6931471805599453,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (4, {"parallel__tp": 2})])
def test_tasks_are_transformers(folder, model, tmp_path, ranks, layout):
    config = runs.values(folder, model, **layout)
    flags = ("--tasks", ",".join(TASKS), "--task-folder", str(folder / "tasks"), "--json")
    launch = runs.by_hand(tmp_path, ranks, "evaluate", config, *flags)
    printed = [process.communicate(250)[0] for process in launch]
    assert all(process.returncode == 0 for process in launch), printed
    line = next(line for line in printed[0].splitlines() if line.startswith('{"student"'))
    found = json.loads(line)["tasks"]
    for (task, name), value in by_transformers(folder, model, tmp_path).items():
        assert found[task][name] == pytest.approx(value, rel=1e-4), (task, name)
