"""On-policy batches: before a step its completions are there, written now or kept; then they are rows like data's."""

import hashlib
import json
import logging
import statistics
from collections.abc import Callable

from megakd.assembly.setup import Setup
from megakd.config import Config
from megakd.generation.engine import Request, Sequence
from megakd.generation.mirror import Mirror
from megakd.generation.results import describe
from megakd.generation.stops import build_stops
from megakd.models.micro_batch import MicroBatch
from megakd.ranks import from_rank_0
from megakd.rollouts.kept import Kept, Rollout, read_rollout
from megakd.rollouts.plan import Plan
from megakd.rollouts.rows import MixedRows, global_rows
from megakd.rollouts.server_writer import ServerWriter
from megakd.rollouts.writer import StudentWriter, Writer

LOG = logging.getLogger("megakd")


class Rollouts:
    """A run's completions, and its batches; stands where `Setup` gives the batches of a run without.

    Args:
        setup: of a run with a rollouts section.
        saved_step: of the checkpoint that this launch continues from; None: it begins.
        mirror: the student as it generates, if it does.
    Raises:
        ConfigError: a stop is unknown.
    Collectives: one broadcast.
    """

    def __init__(self, setup: Setup, saved_step: int | None, mirror: Mirror | None):
        self.setup, self.section = setup, setup.config.rollouts
        self.numbers = sorted(setup.prompts)
        self.plan = Plan(
            prompts=len(self.numbers),
            samples=self.section.samples(setup.config.train.global_batch_size),
            n=self.section.n,
            sync_every=self.section.sync_every,
            seed=setup.config.run.seed,
            steps=setup.steps,
        )
        self.kept, self.settings = Kept(setup.config.run.dir), settings_of(setup.config)
        self.ready: dict[int, list[Rollout]] = {}
        self.rows: tuple[int, MixedRows, list] | None = None
        stops = build_stops(
            setup.tokenizer, self.section.stop_tokens, self.section.stop,
            names=("rollouts.stop_tokens", "rollouts.stop"),
        )  # fmt: skip
        server = self.section.engine == "server"
        self.writer: Writer = ServerWriter(setup, stops) if server else StudentWriter(setup, stops, mirror)
        from_rank_0(lambda: self.kept.drop_after(saved_step))

    def prepare(self, step: int, stopping: Callable[[], bool]) -> bool:
        """Have the completions of a step; False when asked to stop meanwhile, with nothing kept.

        Args:
            step: optimizer steps done.
            stopping: as of `Writer`.
        Raises:
            TrainingError: on every rank; what was written cannot be kept.
        Collectives: one broadcast of kept completions; else those of the writer, and one broadcast.
        """
        if step in self.ready:
            return True
        window = self.plan.window(step)
        self.ready = from_rank_0(lambda: self.found(step, window)) or {}
        if self.ready:
            return True
        if step != window.start:
            LOG.warning(
                "what the weights of step %d have written for step %d is not in %s: those of step %d write anew",
                window.start, step + 1, self.kept.folder, step,
            )  # fmt: skip
        asked = [(due, self.request(place)) for due in range(step, window.stop) for place in self.plan.completions(due)]
        sequences = self.writer.write([request for _, request in asked], step, stopping)
        if sequences is None:
            return False
        self.ready = self.keep(step, asked, sequences)
        return True

    def found(self, step: int, window: range) -> dict[int, list[Rollout]] | None:
        """What was kept for the steps of a window from one of them on; None if that is not all, or of other prompts."""
        for weights_step in range(step, window.start - 1, -1):
            by_step = self.kept.read(weights_step)
            if by_step is not None and all(self.fit(due, by_step.get(due, [])) for due in range(step, window.stop)):
                return by_step
        return None

    def fit(self, step: int, rollouts: list[Rollout]) -> bool:
        """Whether kept completions are those that a step wants, written so, by weights that are not too old."""
        oldest = step + 1 - (self.section.max_staleness or self.section.sync_every)
        wanted = [self.request(place) for place in self.plan.completions(step)]
        return wanted == [Request(r.prompt, r.completion, r.prompt_ids) for r in rollouts] and all(
            r.weights_step >= oldest and r.settings == self.settings for r in rollouts
        )

    def request(self, place: tuple[int, int]) -> Request:
        number = self.numbers[place[0]]
        return Request(number, place[1], tuple(self.setup.prompts[number].ids))

    def keep(
        self, weights_step: int, asked: list[tuple[int, Request]], sequences: list[Sequence]
    ) -> dict[int, list[Rollout]]:
        """Publish what was written, in the order in which it is learnt from."""
        of = {(s.request.prompt, s.request.completion): s for s in sequences}
        fingerprint, prompts, lines, by_step = self.setup.tokenizer.fingerprint, self.setup.prompts, [], {}
        for due, request in asked:
            said = describe(of[request.prompt, request.completion], prompts[request.prompt].text, fingerprint)
            lines.append({"step": due + 1, "weights_step": weights_step, "settings": self.settings, **said})
            by_step.setdefault(due, []).append(read_rollout(lines[-1]))
        from_rank_0(lambda: self.kept.write(weights_step, lines))
        return by_step

    def batch(self, step: int) -> list[MicroBatch]:
        """As `Setup.batch`, of a step that was prepared."""
        mixed, rows = self.mixed(step)
        return self.setup.load(mixed, rows, packed=self.setup.config.data.packing)

    def samples(self, step: int) -> list[list]:
        """As `Setup.samples`; of a row of completions (`rollouts`, its number)."""
        return self.setup.split(self.mixed(step)[1])

    def mixed(self, step: int) -> tuple[MixedRows, list]:
        """What rows are read from, and those of the global batch."""
        if self.rows is None or self.rows[0] != step:
            mine, config = self.ready[step], self.setup.config
            mixed = MixedRows.of(self.setup.train_data, mine, config, step)
            data = self.setup.indices(step, config.train.global_batch_size - self.plan.samples)
            multiple = config.train.micro_batch_size * self.setup.groups.dp.size()
            if config.parallel.vpp > 1:
                multiple *= config.parallel.pp  # what an interleaved schedule takes
            self.rows = step, mixed, global_rows(data, len(mixed.rows), multiple)
        return self.rows[1:]

    def metrics(self, step: int) -> dict[str, float]:
        """Of a step's completions: mean tokens, the share that a stop ended, how many steps old their writer is, and
        its own cross-entropy with them (nats a token), where it is known."""
        mine = self.ready[step]
        known = [rollout for rollout in mine if rollout.logprob is not None]
        found = {
            "completion_tokens": statistics.fmean(len(rollout.ids) for rollout in mine),
            "completions_ended": statistics.fmean(rollout.ended for rollout in mine),
            "completions_staleness": step + 1 - statistics.fmean(rollout.weights_step for rollout in mine),
        }
        if known:
            found["writer_ce"] = -sum(r.logprob for r in known) / sum(len(r.ids) for r in known)
        return found


def settings_of(config: Config) -> str:
    """What shapes a completion beside prompt, weights and seed, as a few hexadecimal digits."""
    section = config.rollouts.model_dump(mode="json", exclude={"server", "concurrency", "prompts", "format"})
    said = json.dumps([section, config.data.sequence_length], sort_keys=True)
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
