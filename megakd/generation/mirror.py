"""A model that is being trained as one that generates, of the same weights."""

from torch import Tensor

from megakd.config import Config, Parallel
from megakd.models.gpt import GPT, build_gpt


class Mirror:
    """The student without what only training needs: dropout, sequence parallelism, hooks of feature losses.

    Its parameters and buffers are the student's own tensors, so it takes no memory and is always up to date.

    Args:
        student: of Megatron's local layers (`build_model(local=True)`), not interleaved.
        config: of the run.
        groups: the run's process groups.
        vocab_size: of the tokenizer: ids that may be written.
        device: of the student.
    """

    def __init__(self, student: GPT, config: Config, groups, vocab_size: int, device):
        assert len(student.chunks) == 1, "the layers of virtual stages are on other ranks"
        self.student = student
        parallel = Parallel(tp=groups.tp.size(), pp=groups.pp.size())
        padded_size = (student.shard.stop - student.shard.start) * groups.tp.size()
        self._gpt = build_gpt(
            student.config.model, parallel, config.train, groups,
            vocab_size=vocab_size, padded_size=padded_size, device=device, seed=None,
            name="the student as it writes", local=True, pipeline=config.student.pipeline,
        ).requires_grad_(False)  # fmt: skip
        self._gpt.eval()
        self.gpt()

    def gpt(self) -> GPT:
        """The model; ask again after the student's tensors may have been replaced (a load, an optimizer that moved
        them into its buffers)."""
        theirs = tensors(self.student)
        for name, tensor in tensors(self._gpt).items():
            tensor.data = theirs[name].data
        return self._gpt


def tensors(gpt: GPT) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict(gpt.named_parameters(remove_duplicate=False)) | dict(gpt.named_buffers(remove_duplicate=False))
