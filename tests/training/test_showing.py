"""What is looked at with every validation: completions to read, and tasks of lm-eval."""

import importlib.util
import json

import pytest

from megakd.errors import ConfigError
from tests.ranks import run_ranks
from tests.training import runs, small

PROMPTS = ["def main(", "import", "class Verb:"]
TASK = {"task": "choose", "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": "answer",
        "doc_to_choice": "choices", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
        "dataset_path": "json", "test_split": "test"}  # fmt: skip
DOCUMENTS = [
    {"text": "def main(", "choices": ["argv)", " return", ":"], "answer": 0},
    {"text": "import", "choices": [" json", " argparse", "class"], "answer": 1},
]


def shown(run_dir, step):
    return [json.loads(line) for line in (run_dir / "generations" / f"step_{step:08d}.jsonl").read_text().splitlines()]


def test_completions_are_written_with_every_validation(folder, tmp_path):
    """They are those of the checkpoint of that step, at another layout, and the run computes what it did without."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    config = runs.values(folder, tmp_path / "run", train__steps=20, parallel__tp=2, parallel__sp=True,
                         student__model__hidden_dropout=0.1)  # fmt: skip
    plain = {
        **config,
        "run": config["run"] | {"dir": str(tmp_path / "plain")},
        "eval": {"samples": 8, "every_steps": 10},
    }
    assert run_ranks(2, runs.train, plain) == [None, None]
    generate = {"prompts": str(prompts), "max_new_tokens": 7, "limit": 2}
    config["eval"] = plain["eval"] | {"generate": generate}
    assert run_ranks(2, runs.train, config) == [None, None]
    assert runs.lines(tmp_path / "run") == runs.lines(tmp_path / "plain")
    early, late = shown(tmp_path / "run", 10), shown(tmp_path / "run", 20)
    assert [entry["prompt"] for entry in early] == [entry["prompt"] for entry in late] == PROMPTS[:2]
    assert [len(entry["completion_ids"]) for entry in late] == [7, 7] and {entry["step"] for entry in late} == {20}
    assert run_ranks(1, generated, str(tmp_path / "run"), [e["prompt_ids"] for e in late]) == [
        [e["completion_ids"] for e in late]
    ]


def generated(rank, ranks, path, prompts):
    """What `megakd generate` makes of a checkpoint."""
    import torch

    from megakd.megatron_on_cpu import install

    install("cpu")
    from megakd.generation.engine import Request
    from megakd.generation.generate import Options, Writer
    from megakd.kernels.next_tokens import Choice
    from megakd.models.groups import destroy_groups

    class Ranks:
        world_size, is_main, device = 1, True, torch.device("cpu")

    try:
        engine = Writer(Options(path, Choice(), 7), Ranks()).engine()
        requests = [Request(number, 0, tuple(ids)) for number, ids in enumerate(prompts)]
        done = [sequence for finished in engine.run(requests) for sequence in finished]
        return [sequence.ids for sequence in sorted(done, key=lambda sequence: sequence.request.prompt)]
    finally:
        destroy_groups()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason='pip install "megakd[eval]"')
def test_tasks_are_measured_with_every_validation_and_disturb_nothing(folder, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    files = {"dataset_kwargs": {"data_files": {"test": str(tasks / "documents.jsonl")}}}
    (tasks / "choose.yaml").write_text(json.dumps(TASK | files))  # JSON is YAML
    config = runs.values(folder, tmp_path / "plain", train__steps=4, student__model__hidden_dropout=0.1,
                         eval__every_steps=2)  # fmt: skip
    assert run_ranks(2, runs.train, config) == [None, None]
    config["run"]["dir"] = str(tmp_path / "run")
    config["eval"] |= {"tasks": ["choose"], "task_folder": str(tasks)}
    assert run_ranks(2, runs.train, config, timeout_seconds=600) == [None, None], "importing lm-eval takes long"
    assert runs.lines(tmp_path / "run") == runs.lines(tmp_path / "plain"), "dropout draws what it did"
    found = runs.lines(tmp_path / "run", "validation")
    assert [line["step"] for line in found] == [2, 4] and all(line["choose/acc"] in (0, 0.5, 1) for line in found)
    config["eval"]["tasks"] = ["choose", "nonsense"]
    config["run"]["dir"] = str(tmp_path / "other")
    assert "ConfigError: lm-eval has no task nonsense" in run_ranks(2, runs.train, config)[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval__generate": {"prompts": "p"}}, "eval.generate: given, but data.validation is null"),
        ({"eval__tasks": ["a"]}, "eval.tasks: given, but data.validation is null"),
        ({"eval__task_limit": 3}, "eval.task_limit: 3 has no effect without tasks"),
        (
            {"eval__generate": {"prompts": "p", "max_new_tokens": 17}, "data__validation": "v"},
            "eval.generate.max_new_tokens: 17 leaves no room for a prompt in 16 tokens",
        ),
        (
            {"eval__generate": {"prompts": "p", "max_new_tokens": 4}, "data__validation": "v", "parallel__cp": 2},
            "parallel.cp: 2 with eval.generate; no model generates so",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(changes, said):
    with pytest.raises(ConfigError) as refused:
        small.config(**changes)
    assert said in str(refused.value)
