"""A training run from its config to its last checkpoint."""

import contextlib
import logging
import pathlib

import torch.distributed as dist

from megakd.assembly.setup import Setup, build_setup
from megakd.config import Config
from megakd.config.section import seconds_of
from megakd.errors import TrainingError
from megakd.generation.mirror import Mirror
from megakd.models.groups import is_last_stage
from megakd.models.micro_batch import MicroBatch
from megakd.planning.flops import forward_flops
from megakd.ranks import Ranks, from_rank_0
from megakd.rollouts.rollouts import Rollouts
from megakd.stopped import write_stopped
from megakd.teachers.whole import judging
from megakd.training.broken import REMEMBERED, keep_evidence, loss_limit
from megakd.training.checkpointing import Progress, Saver, resume_newest, write_stop_file
from megakd.training.evaluation import Evaluation
from megakd.training.export import check_export, export, forget_export
from megakd.training.head_loss import describe_head
from megakd.training.metrics import METRICS_FILE, MetricsLog, Stopwatch, check_sinks, has_line
from megakd.training.optimizer import build_optimizer, memory_peak_bytes, wrap_data_parallel
from megakd.training.overview import overview
from megakd.training.run_folder import open_run_folder, write_run_files
from megakd.training.showing import Showing
from megakd.training.step import BrokenBatch, StudentStep, check_finite
from megakd.training.step_record import StepRecorder, check_recording
from megakd.training.stragglers import compare_ranks
from megakd.training.teacher_check import TeacherCheck
from megakd.training.tracing import Tracer
from megakd.training.witness import StepWitness

LOG = logging.getLogger("megakd")


def train(config: Config, ranks: Ranks) -> None:
    """Train or distil until the last step, a stop signal, or `run.stop_after`; always ends with a checkpoint.

    Args:
        config: the run's.
        ranks: the process group's environment: device, and whether a stop was asked for.
    Raises:
        MegakdError: on every rank, with what to change.
    """
    with contextlib.ExitStack() as held:
        checkpoint = open_run_folder(config, held)
        from_rank_0(lambda: check_sinks(config))
        from_rank_0(lambda: check_export(config))
        saved_step = checkpoint.step if checkpoint else None
        ranks.on_early_stop(lambda: write_stopped(config.run.dir, step=saved_step or 0, finished=False))
        setup = build_setup(config, ranks.device)
        check_recording(setup)
        ddp = wrap_data_parallel(setup.student, config, setup.groups)
        optimizer, scheduler = build_optimizer(ddp, config, setup.steps, setup.groups)
        student = StudentStep(
            setup.student, ddp, setup.teacher, setup.features, setup.loss, optimizer, scheduler, setup.groups,
            routing=setup.routing,
        )  # fmt: skip
        progress = Progress()
        if checkpoint:
            progress = resume_newest(student, checkpoint, config)
            saved_step = progress.step  # of an older one, if the newest was damaged
        else:
            optimizer.reload_model_params()
        if is_last_stage(setup.groups):
            tokens = config.train.micro_batch_size * config.data.sequence_length // config.parallel.cp
            how = describe_head(setup.student, getattr(setup.teacher, "heads", []), tokens, setup.loss)
            LOG.log(logging.INFO if "fused" in how else logging.DEBUG, "%s", how)
        write_run_files(config)
        log = MetricsLog(config, progress.step, setup.steps, enabled=dist.get_rank() == 0)
        held.callback(log.close)
        if progress.step < setup.steps:
            from_rank_0(lambda: forget_export(config))
            log.write("data", progress.step, setup.counts)
        else:
            LOG.info("nothing left to do; more steps: train.steps=N 'run.allow_change=[train.steps]'")
        saver = Saver(config, student, setup.model, setup.tokenizer, setup.origin, saved_step)
        mirror = Mirror(setup) if config.student_writes else None
        rollouts = Rollouts(setup, progress.step if checkpoint else None, mirror) if config.rollouts else None
        showing = Showing(setup, mirror, ranks.pulse) if config.eval.writes else None
        loop = Loop(setup, student, saver, log, progress, ranks, rollouts, showing)
        finished = loop.run()
        loop.tracer.close()
        saver.finish()
        if finished and config.export.format:
            finished = export(config, step_to_export(config, progress), ranks)
        write_stop_file(config.run.dir, progress.step, finished=finished)
        LOG.info(
            "at step %d of %d; checkpoints and metrics.jsonl are in %s", progress.step, setup.steps, config.run.dir
        )


def step_to_export(config: Config, progress: Progress) -> int:
    return progress.best_step or progress.step if config.export.checkpoint == "best" else progress.step


class Loop:
    """The steps of one launch; `progress` is kept up to date."""

    def __init__(
        self,
        setup: Setup,
        student: StudentStep,
        saver: Saver,
        log: MetricsLog,
        progress: Progress,
        ranks: Ranks,
        rollouts: Rollouts | None = None,
        showing: Showing | None = None,
    ):
        self.setup, self.student, self.saver, self.log = setup, student, saver, log
        self.progress, self.ranks, self.config = progress, ranks, setup.config
        self.rollouts, self.source = rollouts, rollouts or setup  # of batches
        self.showing = showing
        self.evaluation = Evaluation(setup.student, judging(setup.teacher), setup.loss, setup.groups)
        self.recorder, self.tracer = StepRecorder(setup, student), Tracer(setup.config, dist.get_rank(), setup.device)
        self.is_introduced = False
        # What the student has written itself is likelier to it than to any teacher.
        self.teacher_is_known = setup.teacher is None or rollouts is not None or setup.config.teacher.allow_weak

    def run(self) -> bool:
        """All steps of this launch, each followed by what is due after it; True when the whole run is finished."""
        progress = self.progress
        last, stop_after = self.setup.steps, self.config.run.stop_after
        if isinstance(stop_after, int):
            last = min(last, progress.step + stop_after)
        elif stop_after:
            self.ranks.stop_after(seconds_of(stop_after))
        stop = self.ranks.agree_to_stop()
        if not stop and self.owes_validation():
            stop = not self.validate()
        while progress.step < last and not stop:
            if self.rollouts and not self.has_rollouts():
                stop = True
                break
            self.one_step()
            if self.tracer.ends_with(progress.step):
                self.ranks.pulse.mark("save", progress.step)
                self.tracer.close()
            with self.student.phases.saving():
                self.saver.poll()
            stop = self.ranks.agree_to_stop()
            ending = stop or progress.step == last
            if ending or due(self.config.checkpoint.every_steps, progress.step):
                self.save()  # before validation, which may take long or fail
            if not stop and (
                due(self.config.eval.every_steps, progress.step) or (ending and self.setup.validation_data)
            ):
                stop = not self.validate()
        if stop:
            self.save()
            LOG.info("asked to stop, or run.stop_after has passed: the checkpoint of step %d is written", progress.step)
        return progress.step >= self.setup.steps and not self.owes_validation()

    def has_rollouts(self) -> bool:
        """Have the student write what the next step learns from; False when asked to stop meanwhile."""
        step = self.progress.step

        def stopping() -> bool:
            self.ranks.pulse.mark("rollouts", step + 1)
            return self.ranks.agree_to_stop()

        self.ranks.pulse.mark("weights", step + 1)  # they may be exported: nothing that repeats in a steady time
        with self.student.phases.aside("rollouts"):
            return self.rollouts.prepare(step, stopping)

    def save(self) -> None:
        if self.progress.step > 0:
            self.ranks.pulse.mark("save", self.progress.step)
            with self.student.phases.saving():
                self.log.sync()
                self.saver.save(self.progress, {})

    def owes_validation(self) -> bool:
        """Whether the step reached was to be validated, and an end came before its line was written.

        Collectives: one broadcast.
        """
        step, data = self.progress.step, self.setup.validation_data
        if step == 0 or not data or not (due(self.config.eval.every_steps, step) or step == self.setup.steps):
            return False
        path = pathlib.Path(self.config.run.dir) / METRICS_FILE
        return not from_rank_0(lambda: has_line(path, "validation", step))

    def one_step(self) -> None:
        progress, phases = self.progress, self.student.phases
        self.tracer.before(progress.step + 1)
        phases.start()
        self.ranks.pulse.mark("data", progress.step + 1)
        phases.begin("data")
        micro_batches = self.source.batch(progress.step)
        phases.begin("other")
        witness = self.witness(micro_batches)
        self.ranks.pulse.mark("step", progress.step + 1)
        logged = due(self.config.log.every_steps, progress.step + 1)
        limit = loss_limit(progress.recent, self.config.train.spike_factor)
        check = None if self.teacher_is_known else self.teacher_check(micro_batches)
        try:
            metrics = self.student(
                micro_batches,
                step=progress.step + 1,
                measure=logged or check is not None,
                loss_limit=limit,
                check=check,
                witness=witness,
            )
        except BrokenBatch as error:
            self.testify(witness, None)
            self.leave_out(error, micro_batches)
            return
        self.testify(witness, metrics)
        progress.step += 1
        if metrics is None:
            progress.skipped += 1
            self.log.advance(None)
            return
        self.teacher_is_known = True
        self.account(metrics, micro_batches, logged)

    def witness(self, micro_batches: list[MicroBatch]) -> StepWitness | None:
        """Who sees the step that begins, if it is to be recorded."""
        step = self.progress.step + 1
        if step not in self.config.run.record_steps:
            return None
        self.ranks.pulse.mark("save", step)
        self.student.phases.begin("save")
        witness = self.recorder.begin(step, micro_batches)
        self.student.phases.begin("other")
        return witness

    def testify(self, witness: StepWitness | None, metrics: dict[str, float] | None) -> None:
        """Write what the witness saw; None: the step was left out."""
        if witness is None:
            return
        self.ranks.pulse.mark("save", self.progress.step + 1)
        self.student.phases.begin("save")
        self.recorder.finish(self.progress.step + 1, witness, metrics)
        self.student.phases.begin("other")

    def account(self, metrics: dict[str, float], micro_batches: list[MicroBatch], logged: bool) -> None:
        """Count a step that was taken, and show and write its metrics."""
        progress = self.progress
        tokens = metrics.pop("tokens")
        progress.tokens += int(tokens)
        positions = sum(micro_batch.ids_BS.numel() for micro_batch in micro_batches) * self.setup.groups.dp.size()
        progress.recent = [*progress.recent, metrics["loss"]][-REMEMBERED:]
        metrics |= self.student.phases.read(last=logged)
        metrics |= self.speed(metrics["seconds"], tokens, positions)
        if self.rollouts:
            metrics |= self.rollouts.metrics(progress.step - 1)
        if not self.is_introduced:
            self.is_introduced = True
            said = overview(self.setup, self.setup.steps - progress.step, tokens, metrics["seconds"])
            LOG.info("step %d: %s", progress.step, said)
        if logged:
            metrics |= compare_ranks(metrics["data_seconds"] + self.student.own.read(), self.setup.device)
            counts = {"tokens": progress.tokens, "skipped": progress.skipped, "broken": progress.broken}
            self.log.write("train", progress.step, metrics | counts)
        self.log.advance(metrics)

    def teacher_check(self, micro_batches: list[MicroBatch]) -> TeacherCheck:
        teacher, progress = self.config.teacher, self.progress
        return TeacherCheck(
            micro_batches,
            vocab_size=self.setup.tokenizer.vocab_size,
            source=" and ".join(teacher.caches) or teacher.checkpoint or "",
            fresh=progress.step == progress.skipped + progress.broken,
            group=self.setup.groups.dp_cp,
            named=tuple((named.name, named.checkpoint) for named in self.config.teachers),
        )

    def leave_out(self, error: BrokenBatch, micro_batches: list[MicroBatch]) -> None:
        """Keep what is needed to look into a batch that breaks the run, and go on without it if that is allowed.

        Raises:
            TrainingError: on every rank, when train.max_skipped_steps have been left out before.
        """
        self.student.leave_out()
        progress, why = self.progress, str(error).partition("\nhint:")[0]
        samples = self.source.samples(progress.step)
        folder = keep_evidence(self.config.run.dir, progress.step + 1, why, self.student, micro_batches, samples)
        if progress.broken >= self.config.train.max_skipped_steps:
            kept = f"{why}; its samples and the loss of each token are in {folder}"
            raise TrainingError(kept, hint=error.hint) from error
        progress.step += 1
        progress.broken += 1
        LOG.warning("%s; left out (%d so far), see %s", why, progress.broken, folder)
        self.log.advance(None)

    def speed(self, seconds: float, tokens: float, positions: int) -> dict[str, float]:
        """Throughput of one step; FLOP of the teacher's forward and the student's forward and backward pass."""
        setup, length = self.setup, self.config.data.sequence_length
        flops = 3 * forward_flops(setup.model, length)
        if setup.teacher_models:  # of several, which share the samples, their mean
            theirs = [forward_flops(model, length) for model in setup.teacher_models]
            flops += sum(theirs) / len(theirs)
        return {
            "tflops_per_rank": positions * flops / seconds / dist.get_world_size() / 1e12,
            "tokens_per_second": tokens / seconds,
            "peak_memory_bytes": memory_peak_bytes(setup.device),
        }

    def validate(self) -> bool:
        """Measure, log and keep; False when asked to stop before the end, with nothing logged."""
        watch, progress = Stopwatch(), self.progress

        def stopping() -> bool:
            self.ranks.pulse.mark("validation", progress.step)
            return self.ranks.agree_to_stop()

        self.evaluation.loss = self.setup.loss.at(progress.step)
        if self.setup.loss.ramps.temperature is not None:
            self.evaluation.teacher.temperature = self.evaluation.loss.temperature
        metrics = self.evaluation(self.setup.validation_batches(), self.setup.device, stopping)
        if metrics is None:
            return False
        if self.showing:
            shown = self.showing(progress.step, stopping)
            if shown is None:
                return False
            metrics |= shown
        if "loss" not in metrics:  # no supervised token
            return True
        check_finite(metrics, ["loss"], f"validation at step {progress.step}")
        self.log.write("validation", progress.step, metrics | {"seconds": watch.lap()})
        metrics = {name: value for name, value in metrics.items() if name != "calibration"}  # for the checkpoint
        best = progress.best_loss is None or metrics["loss"] < progress.best_loss
        if best:
            progress.best_loss, progress.best_step = metrics["loss"], progress.step
        if self.saver.saved_step == progress.step:
            self.saver.add_metrics(progress, metrics)
        elif best and self.config.checkpoint.keep_best:
            self.saver.save(progress, metrics)
        return True


def due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
