"""The `cache` section: what `megakd cache` records."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megakd.config.section import Count, CountOrZero, Positive, Section, Share, Text


class Cache(Section):
    """What `megakd cache` records into teacher.cache, of the samples that this config would train and validate on"""

    mode: Literal["top_k", "top_p", "sampled", "hybrid", "hidden"] = "top_k"
    """Which entries of the teacher's distribution are kept per token: the top_k most likely; the most likely that
    together reach top_p; draws from the whole distribution; or the top_k most likely and draws from the rest. hidden:
    the whole distribution, as the teacher's last hidden states, with its output layer once: it serves every
    loss.targets at every temperature."""
    top_k: Count | None = None
    """Most entries kept per token (not of the modes sampled and hidden); null: loss.top_k. Training may use fewer."""
    top_p: Share | None = None
    """Mass that the entries reach, with top_k as their limit (top_p only, and needed there)."""
    draws: Annotated[int, Field(ge=1, lt=2**16)] | None = None
    """Draws per token (sampled and hybrid only, and needed there)."""
    codec: Literal["fp32", "fp16", "bf16", "q8"] | None = None
    """How log-probabilities are stored: exactly, as float16, or in 8 bits; null: fp16. Sampled entries are counts,
    always exact. How hidden states are: fp32, bf16, or in 8 bits; null: bf16, which is exact of a bf16 teacher."""
    temperatures: list[Positive] = Field(default=[])
    """Temperatures that training may use, each with a tail of its own; empty: loss.temperature. Draws have one only,
    hidden states need none named."""
    keep_label: bool = False
    """The data's next token is always among the entries, in place of the least likely one (top_k and top_p only)."""
    start: CountOrZero = 0
    """First sample to record, in the order validation data, then training data in training order. With end it lets
    several jobs share the work, each into a folder of its own; `megakd cache merge` joins them."""
    end: Count | None = None
    """Sample to stop before; null: all that the run would read."""
    share: Text | None = None
    """Instead of start and end: `I/N`, the I-th (from 0) of N equal shares of the samples, such as an array's job I."""
    shard_samples: Count | None = None
    """Samples of one shard, which is written at once and is what a kill may lose; null: about 128 MiB."""

    def problems(self) -> Iterator[tuple[str, str]]:
        drawn = self.mode in ("sampled", "hybrid")
        if (self.top_p is not None) != (self.mode == "top_p"):
            yield "top_p", f"{'missing' if self.top_p is None else self.top_p}; only mode top_p has it, and needs it"
        if (self.draws is not None) != drawn:
            seen = "missing" if self.draws is None else self.draws
            yield "draws", f"{seen}; only the modes sampled and hybrid have it, and need it"
        if self.mode == "sampled" and self.top_k is not None:
            yield "top_k", f"{self.top_k} has no effect with mode sampled, which has draws only; expected null"
        yield from self._hidden_problems()
        if drawn and len(self.temperatures) > 1:
            yield "temperatures", f"{self.temperatures}; draws are made at one temperature"
        if len(set(self.temperatures)) < len(self.temperatures):
            yield "temperatures", f"{self.temperatures} names one twice"
        if drawn and self.keep_label:
            yield "keep_label", f"true, but mode {self.mode} draws its entries"
        if self.end is not None and self.end <= self.start:
            yield "end", f"{self.end} must be above start = {self.start}"
        if self.share is not None:
            numbers = re.fullmatch(r"(\d+)/(\d+)", self.share)
            if numbers is None or int(numbers[1]) >= int(numbers[2]):
                yield "share", f"{self.share!r}; expected I/N with I from 0 to N - 1, such as 0/4"
            if self.start or self.end:
                yield "share", f"{self.share} and start or end; expected one or the other"

    def _hidden_problems(self) -> Iterator[tuple[str, str]]:
        if (self.codec == "bf16" and self.mode != "hidden") or (self.codec == "fp16" and self.mode == "hidden"):
            expected = "fp32, bf16 or q8" if self.mode == "hidden" else "fp32, fp16 or q8"
            yield "codec", f"{self.codec}; expected {expected} with mode {self.mode}"
        if self.mode == "hidden":
            for name, none in (("top_k", None), ("temperatures", []), ("keep_label", False)):
                if getattr(self, name) != none:
                    yield name, f"{getattr(self, name)} has no effect with mode hidden, which keeps the whole"

    def bounds(self, samples: int) -> tuple[int, int]:
        """First sample to record, and the one to stop before, of so many."""
        if self.share is None:
            return self.start, min(self.end or samples, samples)
        number, shares = map(int, self.share.split("/"))
        return samples * number // shares, samples * (number + 1) // shares
