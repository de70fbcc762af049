"""Which of several teachers teaches a sample, by the source that it is from."""

import dataclasses

from megakd.config import Config, paths_of
from megakd.data.blend import BlendedDataset


@dataclasses.dataclass(frozen=True)
class Taught:
    """Numbers of teachers.

    Attributes:
        train, validation: the teacher of each part of the data, in the order of data.train and data.validation.
    """

    train: tuple[int, ...]
    validation: tuple[int, ...]

    @classmethod
    def of(cls, config: Config) -> "Taught | None":
        """As the teachers section has it; None where there is one teacher, or none."""
        if not config.teachers:
            return None
        number = {path: number for number, teacher in enumerate(config.teachers) for path in teacher.data}
        return cls(*(tuple(number[path] for path in paths_of(x)) for x in (config.data.train, config.data.validation)))

    def number(self, data, index: tuple[int, int] | None, *, validation: bool) -> int:
        """The teacher of a sample of the training or the validation data; -1 of None, which stands for no sample."""
        if index is None:
            return -1
        part = data.locate(*index)[0] if isinstance(data, BlendedDataset) else 0
        return (self.validation if validation else self.train)[part]

    def together(self, data, indices: list, *, validation: bool) -> list:
        """A rank's samples with those of one teacher side by side, so that few micro-batches have several."""
        return sorted(indices, key=lambda index: (index is None, self.number(data, index, validation=validation)))
