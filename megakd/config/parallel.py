"""The parallel section, and how a model's layers are split over pipeline stages."""

from typing import Literal

from megakd.config.section import Count, Section


class Parallel(Section):
    """How student and teacher are cut over the ranks; what tp x pp x cp leaves of them is data parallel"""

    tp: Count = 1
    """Tensor parallel size, in ranks."""
    pp: Count = 1
    """Pipeline parallel size, in ranks."""
    vpp: Count = 1
    """Virtual pipeline stages of a rank: the student's layers go round its ranks so many times, which shortens the
    waiting at both ends of a step. The teacher, which only runs forward, is not interleaved. Needs pp > 1."""
    cp: Count = 1
    """Context parallel size, in ranks: every sequence is cut over so many, for those that are too long for one."""
    ep: Count = 1
    """Expert parallel size, in ranks: the experts of a layer are divided among so many of a pipeline stage's tp x cp x
    dp ranks. Above 1 an expert is whole on its rank; at 1 experts are cut over tp like everything else."""
    fsdp: Literal["off", "teacher", "both"] = "off"
    """Weights are cut over the dp x cp ranks as well, by torch's FSDP2: a layer's are gathered where it runs.
    `teacher`: of a teacher that runs; `both`: of the student too, with gradients and optimizer state, where pp is 1."""
    fsdp_by: Literal["torch", "megatron"] = "torch"
    """Whose FSDP cuts the student (fsdp = both): torch's FSDP2, or Megatron-FSDP, which gathers large buffers and needs
    einops. A teacher is always cut by torch's. Checkpoints are the same."""
    sp: bool = False
    """Sequence parallel: activations between the tensor parallel regions are cut along the sequence. Needs tp > 1."""

    @property
    def of_teacher(self) -> "Parallel":
        """The teacher's layout: stages are interleaved for the sake of the backward pass, which it does not have."""
        return self.model_copy(update={"vpp": 1})

    def shards(self, whose: str) -> bool:
        """Whether FSDP cuts the weights of `student` or `teacher`."""
        return self.fsdp == "both" or self.fsdp == whose

    @property
    def sequence_multiple(self) -> int:
        """What the length of a row must be divisible by: two chunks for every context parallel rank, cut over tp."""
        return (2 * self.cp if self.cp > 1 else 1) * (self.tp if self.sp else 1)


class TeacherParallel(Section):
    """The layout of a teacher that runs, where it is another than the student's"""

    tp: Count
    """Tensor parallel size, in ranks; a multiple of parallel.tp. The ranks of several student replicas are then one of
    the teacher, which runs their micro-batches one after the other. Not with cp, ep or features."""
    sp: bool | None = None
    """Sequence parallel for the teacher; null: as parallel.sp."""


class Pipeline(Section):
    """How a model's layers are split over pipeline stages, where not evenly; the stages between share what is left"""

    first_stage_layers: Count | None = None
    """Layers of the first stage, which has the embeddings too; null: as many as the others."""
    last_stage_layers: Count | None = None
    """Layers of the last stage, which has the head and the loss too; null: as many as the others."""
