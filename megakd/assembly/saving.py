"""The student's present weights in a folder of their own: a checkpoint without optimizer, or a Hugging Face folder."""

import pathlib

from megakd.assembly.setup import Setup
from megakd.checkpoints import folder, torch_dist
from megakd.converters.huggingface.exporting import export_hf
from megakd.errors import CheckpointError
from megakd.models.groups import layout
from megakd.publish import publish_written, remove
from megakd.ranks import from_rank_0


def save_weights(path: pathlib.Path, setup: Setup, step: int) -> None:
    """The student as a checkpoint that no run can continue from: what it knows after `step` steps.

    Raises:
        CheckpointError: on every rank; it cannot be written.
    Collectives: those of saving.
    """
    groups = setup.groups
    state = {"model": torch_dist.describe_weights(setup.student, groups)}
    parts = {"model": setup.model, "step": step, "training": False, "metrics": {}, "layout": layout(groups)}

    def publish(written) -> None:
        folder.publish(path, tokenizer=setup.tokenizer, origin=setup.origin, written=written, **parts)

    torch_dist.save(path, state, groups, publish)


def export_student(path: pathlib.Path, setup: Setup, step: int) -> None:
    """The student as a Hugging Face folder, which is whole or not there.

    Raises:
        CheckpointError: on every rank; it cannot be written, or no family of Hugging Face's expresses the model.
    Collectives: those of saving, one broadcast; rank 0 converts.
    """
    weights = path.with_name(f"{path.name}.megatron")
    save_weights(weights, setup, step)

    def export() -> None:
        try:
            target = folder.begin(path)
            export_hf(folder.read_checkpoint(weights, "never"), target)
            publish_written(target, path)
            remove(weights)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written: {error}", hint="free space on that disk, or name another folder"
            ) from error

    from_rank_0(export)
