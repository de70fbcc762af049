"""Sequences through a model, many at a time: a finished one gives its slot to the next.

Each step either reads the prompts of the sequences that join, or gives every sequence under way one more token. All
ranks of a model do the same steps: the last pipeline stage chooses the tokens, and the others are told.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from megakd.errors import CheckpointError
from megakd.generation.stops import Stops
from megakd.kernels.next_tokens import Choice, Chosen, choose_next
from megakd.models.forward_only import forward_only
from megakd.models.gpt import GPT
from megakd.models.groups import is_last_stage
from megakd.models.kv_cache import KVCache, NewTokens, next_tokens, whole_prompts

PROMPT_TOKENS = 8192  # of the prompts that one forward pass reads, at most; a longer one is read alone
STRIDE = 0x9E3779B97F4A7C15  # seeds of the tokens of a sequence; the golden ratio


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion that is wanted.

    Attributes:
        prompt: its number in the input.
        completion: its number among the prompt's completions.
        ids: of the prompt, at least one.
    """

    prompt: int
    completion: int
    ids: tuple[int, ...]


@dataclasses.dataclass
class Sequence:
    """A request under way, or done.

    Attributes:
        request: what was asked for.
        seed: of its draws.
        ids, logprobs: written so far; log-probabilities (nats) at temperature 1 over the whole vocabulary.
        reason: why it ended: `stop` or `length`; None while it is under way.
        stop: the text or the id that ended it.
        text: of the ids, without what ended it; once it is done.
    """

    request: Request
    seed: int
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    reason: str | None = None
    stop: str | int | None = None
    text: str = ""


class Engine:
    """Generates with one model.

    Args:
        gpt: this rank's part, of Megatron's local layers and without sequence parallelism.
        groups: process groups.
        device: of the model.
        choice: how tokens are chosen.
        stops: what ends a sequence.
        max_new_tokens: at which a sequence ends at the latest.
        slots: sequences under way at once.
        seed: of draws; with the numbers of prompt and completion it determines them, whatever is generated beside.
    """

    def __init__(
        self, gpt: GPT, groups, device, choice: Choice, stops: Stops, *, max_new_tokens: int, slots: int, seed: int
    ):
        self.gpt, self.groups, self.device = gpt.eval(), groups, device
        self.choice, self.stops, self.max_new_tokens, self.slots, self.seed = choice, stops, max_new_tokens, slots, seed

    def run(self, requests: Iterable[Request]) -> Iterator[list[Sequence]]:
        """The sequences that each step has finished, some of them none; the same on all ranks of the model.

        Args:
            requests: the same on all ranks of the model; read as places become free. Prompt and new tokens together
                fit the model.
        Raises:
            CheckpointError: the model's logits are not finite.
        Collectives: those of the model and of `choose_next`; with pipeline stages one broadcast of 16 B a sequence.
        """
        waiting, ahead, active = iter(requests), None, []
        with KVCache(self.gpt, self.slots, self.gpt.config.model.max_sequence_length) as cache:
            while True:
                joining = []
                while len(active) + len(joining) < self.slots:
                    ahead = ahead or next(waiting, None)
                    tokens = sum(len(request.ids) for request in joining)
                    if ahead is None or (joining and tokens + len(ahead.ids) > PROMPT_TOKENS):
                        break
                    joining.append(ahead)
                    ahead = None
                if joining:
                    active += self._join(joining, len(active), cache)
                elif active:
                    self._go_on(active, cache)
                else:
                    return
                yield self._leave(active, cache)

    def _join(self, requests: list[Request], first_slot: int, cache: KVCache) -> list[Sequence]:
        """Read prompts into the slots from `first_slot` on and choose their first tokens; equal ones are read once."""
        slots: dict[tuple[int, ...], int] = {}
        for slot, request in enumerate(requests, first_slot):
            slots.setdefault(request.ids, slot)
        ends, place = {}, -1
        for ids in slots:
            place += len(ids)
            ends[ids] = place
        sequences = [Sequence(request, sequence_seed(self.seed, request)) for request in requests]
        step = whole_prompts([(slot, list(ids)) for ids, slot in slots.items()], self.device)
        rows = [ends[request.ids] for request in requests]
        self._add(sequences, self._choose(step, rows, sequences, cache))
        for slot, request in enumerate(requests, first_slot):
            if slots[request.ids] != slot:
                cache.copy(slots[request.ids], slot, len(request.ids))
        return sequences

    def _go_on(self, sequences: list[Sequence], cache: KVCache) -> None:
        """One more token for each of the sequences, which have the slots 0, 1, 2, ..."""
        ids = [sequence.ids[-1] for sequence in sequences]
        positions = [len(sequence.request.ids) + len(sequence.ids) - 1 for sequence in sequences]
        step = next_tokens(ids, positions, self.device)
        self._add(sequences, self._choose(step, None, sequences, cache))

    @torch.no_grad()
    def _choose(
        self, step: NewTokens, rows: list[int] | None, sequences: list[Sequence], cache: KVCache
    ) -> list[list[float]]:
        """[ids, log-probabilities] of the next tokens of sequences.

        Args:
            rows: of the step's tokens, behind which each sequence goes on; None: there is one token for each.
        """

        def keep(hidden_SBH, _) -> Chosen:
            rows_T = None if rows is None else torch.tensor(rows, device=self.device)
            seeds = [signed(sequence.seed + STRIDE * len(sequence.ids)) for sequence in sequences]
            seed_T = torch.tensor(seeds, dtype=torch.int64, device=self.device)
            return choose_next(self.gpt.logits(hidden_SBH, rows_T), self.gpt.shard, self.choice, seed_T)

        cache.begin(step)
        kept = forward_only(self.gpt, [step], keep, self.groups)
        if is_last_stage(self.groups):
            table_2T = torch.stack([kept[0].id_T.double(), kept[0].logprob_T.double()])
        else:
            table_2T = torch.zeros(2, len(sequences), dtype=torch.float64, device=self.device)
        if self.groups.pp.size() > 1:
            dist.broadcast(table_2T, group=self.groups.pp, group_src=self.groups.pp.size() - 1)
        return table_2T.tolist()

    def _add(self, sequences: list[Sequence], chosen: list[list[float]]) -> None:
        for sequence, token, logprob in zip(sequences, *chosen, strict=True):
            if logprob != logprob:
                raise CheckpointError(
                    f"the model's logits are not finite after {len(sequence.ids)} new tokens of prompt "
                    f"{sequence.request.prompt}",
                    hint="`megakd check` reads the checkpoint's weights; --precision bf16 and fp32 may differ in this",
                )
            sequence.ids.append(int(token))
            sequence.logprobs.append(logprob)
            self.stops.apply(sequence, self.max_new_tokens)

    def _leave(self, active: list[Sequence], cache: KVCache) -> list[Sequence]:
        """Take the finished sequences out; the last ones move to their slots, so that those under way come first."""
        finished = [sequence for sequence in active if sequence.reason]
        for slot in reversed(range(len(active))):
            if active[slot].reason:
                last = active.pop()
                if slot < len(active):
                    active[slot] = last
                    cache.copy(len(active), slot, len(last.request.ids) + len(last.ids) - 1)
        return finished


def sequence_seed(seed: int, request: Request) -> int:
    """64 bits that are a sequence's own; all of its draws follow from them."""
    name = f"{seed} {request.prompt} {request.completion}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def signed(bits: int) -> int:
    """The lowest 64 bits, as the number that int64 holds them for."""
    return (bits + (1 << 63)) % (1 << 64) - (1 << 63)
