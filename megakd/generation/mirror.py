"""A model that is being trained as one that generates, of the same weights."""

from torch import Tensor

from megakd.assembly.setup import Setup
from megakd.config import Parallel
from megakd.models.gpt import GPT, build_gpt


class Mirror:
    """The student without what only training needs: dropout, sequence parallelism, hooks of feature losses.

    Its parameters and buffers are the student's own tensors, so it takes no memory and is always up to date.

    Args:
        setup: of a run whose student is of Megatron's local layers (`build_model(local=True)`), and not interleaved.
    """

    def __init__(self, setup: Setup):
        student, config, groups = setup.student, setup.config, setup.groups
        assert len(student.chunks) == 1, "the layers of virtual stages are on other ranks"
        self.student = student
        self._gpt = build_gpt(
            setup.model, Parallel(tp=groups.tp.size(), pp=groups.pp.size()), config.train, groups,
            vocab_size=setup.tokenizer.vocab_size,
            padded_size=(student.shard.stop - student.shard.start) * groups.tp.size(),
            device=setup.device, seed=None, name="the student as it writes", local=True,
            pipeline=config.student.pipeline,
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
