"""The `prune` section: what `megakd prune` leaves of a model."""

from collections.abc import Iterator

from pydantic import Field

from megakd.config.section import Count, CountOrZero, Section

SIZES = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_query_groups",
    "num_experts", "expert_ffn_hidden_size", "shared_ffn_hidden_size",
)  # fmt: skip


class Prune(Section):
    """What `megakd prune` leaves of teacher.checkpoint in student.checkpoint, the student that it writes"""

    num_layers: Count | None = None
    """Layers: those that change their input most (1 - cosine of what goes in and comes out); null: all, or as named."""
    keep_layers: list[CountOrZero] = Field([])
    """Instead, the layers to keep, counted from 0."""
    drop_layers: list[CountOrZero] = Field([])
    """Instead, the layers to leave out, counted from 0."""
    hidden_size: Count | None = None
    """Channels of the residual stream, the same in all layers; null: all. As everywhere below, those of the largest
    mean magnitude over the calibration data are kept."""
    ffn_hidden_size: Count | None = None
    """Inner channels of every feed-forward block that has no experts."""
    num_query_groups: Count | None = None
    """Key/value heads of every layer, each with its query heads; without grouped queries the query heads."""
    num_experts: Count | None = None
    """Experts of every layer that has some."""
    expert_ffn_hidden_size: Count | None = None
    """Inner channels of every expert."""
    shared_ffn_hidden_size: Count | None = None
    """Inner channels of the experts that every token passes."""
    samples: Count = 1024
    """Samples of calibration data: the first that training with this config would read; fewer if there are not so
    many."""
    tp: Count | None = None
    """Tensor parallel size that the student's sizes shall be divisible by; null: parallel.tp."""

    def problems(self) -> Iterator[tuple[str, str]]:
        named = [key for key in ("num_layers", "keep_layers", "drop_layers") if getattr(self, key)]
        if len(named) > 1:
            yield named[1], f"{getattr(self, named[1])}, and {named[0]} too; expected one of them"
        for key in ("keep_layers", "drop_layers"):
            layers = getattr(self, key)
            if len(set(layers)) < len(layers):
                yield key, f"{layers} names a layer twice"

    @property
    def cuts_depth(self) -> bool:
        return bool(self.num_layers or self.keep_layers or self.drop_layers)
