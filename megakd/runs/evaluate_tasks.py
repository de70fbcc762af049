"""`megakd evaluate CONFIG.yaml --tasks NAMES`: EleutherAI's lm-eval tasks, of one model or of several side by side."""

from megakd.config import Config

SEQUENCES = 16  # scored or written at once in one model


def evaluate_tasks(
    config: Config, path: str, ranks, *, tasks: list[str], folder: str | None, limit: int | None
) -> dict[str, dict]:
    """lm-eval's results of one model: task -> metric -> value.

    Args:
        config: layout and precision are taken from it, and data.tokenizer where the checkpoint carries none.
        path: checkpoint, run or Hugging Face folder.
        folder: with YAML files of further tasks.
        limit: documents of each task.
    """
    from megakd.assembly.architectures import check_padding, choose_tokenizer, with_vocab
    from megakd.assembly.models import build_model
    from megakd.config import check_model
    from megakd.converters.direct import open_checkpoint
    from megakd.generation.tasks import Adapter, open_tasks, run_tasks
    from megakd.models.gpt import padded_vocab_size
    from megakd.models.groups import build_groups, destroy_groups
    from megakd.ranks import from_rank_0

    layout = config.parallel.model_copy(update={"sp": False, "vpp": 1, "cp": 1, "ep": 1})
    config = config.model_copy(update={"parallel": layout})
    checkpoint = from_rank_0(lambda: open_checkpoint(path, config.checkpoint.verify, progress=config.log.progress))
    tokenizer = choose_tokenizer(config, checkpoint)
    model = with_vocab(checkpoint.model, tokenizer, f"model {path}")
    check_model(config, model, f"model {path}")
    padded_size = padded_vocab_size(model.vocab_size)
    check_padding(padded_size, config.parallel.tp)
    groups = build_groups(config.parallel.tp, config.parallel.pp, config.run.seed)
    gpt = build_model(
        model, checkpoint, config.parallel, config.train, groups,
        vocab_size=tokenizer.vocab_size, padded_size=padded_size, device=ranks.device, local=True,
    ).eval()  # fmt: skip
    adapter = Adapter(gpt, tokenizer, groups, ranks.device, SEQUENCES)
    found = run_tasks(adapter, tasks, open_tasks(tasks, folder), limit)
    destroy_groups()  # the next model has its own
    return found


def task_table(results: dict[str, dict[str, dict]]) -> str:
    """A line for each task and metric, a column for each model; standard errors behind the values.

    Args:
        results: model -> task -> metric -> value.
    """
    lines = dict.fromkeys(
        (task, name) for found in results.values() for task, values in found.items() for name in values
    )
    rows = [["task", "metric", *results]]
    for task, name in lines:
        if "_stderr" not in name and name != "sample_len":
            values = [found.get(task, {}) for found in results.values()]
            rows.append([task, name.removesuffix(",none"), *(cell(one, name) for one in values)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def cell(values: dict, name: str) -> str:
    metric, comma, kind = name.partition(",")
    error = values.get(f"{metric}_stderr{comma}{kind}")
    if name not in values:
        return "-"
    return f"{values[name]:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
