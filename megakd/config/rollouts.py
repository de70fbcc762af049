"""The rollouts section: what the student writes itself, for the teacher to score and the student to learn from."""

import urllib.parse
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from megakd.config.paths import LocalPath
from megakd.config.section import Count, NotNegative, Positive, Section, Share, Text

FORMATS = Literal["auto", "text", "prompt_response", "alpaca", "nemo_chat", "messages", "ids"]


def axes_in_the_way(parallel, wanted_by: str) -> Iterator[tuple[str, str]]:
    """Yields (dotted key, what is wrong) for the ways in which a model that generates is not cut.

    Args:
        wanted_by: the key that has the student generate.
    """
    seen = {axis: size for axis in ("vpp", "cp", "ep") if (size := getattr(parallel, axis)) > 1}
    if parallel.shards("student"):
        seen["fsdp"] = parallel.fsdp
    for axis, value in seen.items():
        yield f"parallel.{axis}", f"{value} with {wanted_by}; no model generates so"


class Server(Section):
    """OpenAI-compatible completion servers (vLLM, SGLang) that write in the student's place, with its weights"""

    urls: list[Text]
    """Addresses, without /v1: `[http://node7:8000, http://node8:8000]`. They share the prompts."""
    reload: list[dict[Text, Any]]
    """Requests that make a server take new weights, in order: `{path: /update, json: {model_path: "{folder}"}}` each,
    where {folder} is the exported folder. docs/on-policy.md has those of vLLM and SGLang."""
    folder: LocalPath | None = None
    """Where the student is exported to as a Hugging Face folder, a new one each time, under a path that the servers see
    too; null: `rollouts/weights` in the run folder."""
    served_name: Text | None = None
    """Name of the model in requests; null: the first that a server lists."""
    timeout_seconds: Positive = 600.0
    """Seconds that a completion, or taking new weights, may take."""
    dead_seconds: Positive = 60.0
    """Seconds after which a server that does not answer, or answers with errors of its own (5xx), counts as dead. Its
    prompts go to the others; a launch without any ends."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.urls:
            yield "urls", "[]; expected at least one address"
        for url in self.urls:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.rstrip("/") not in ("", "/"):
                yield "urls", f"{url}; expected an address such as http://node7:8000"
        if len(set(self.urls)) < len(self.urls):
            yield "urls", f"{self.urls} names one twice"
        if not self.reload:
            yield "reload", "[]; a server that is never given the student's weights writes with others"
        for call in self.reload:
            path = call.get("path")
            if not isinstance(path, str) or not path.startswith("/") or set(call) - {"path", "json"}:
                yield "reload", f"{call}; expected {{path: /PATH, json: ANYTHING}}"


class Rollouts(Section):
    """On-policy distillation: the student completes prompts, the teacher scores those very ids"""

    engine: Literal["megakd", "server"] = "megakd"
    """Who generates: `megakd`, the student itself where it is trained; `server`, a server that is given its weights."""
    server: Server | None = None
    prompts: LocalPath
    """Prompts: a file, folder or pattern in any form that data.train takes; answers that are there are left out."""
    format: FORMATS = "auto"
    """What a record of prompts is, as of data.format; its keys, templates and bos are those of the data section."""
    n: Count = 1
    """Completions of a prompt."""
    temperature: NotNegative = 1.0
    """Divides the logits that tokens are drawn from; 0 takes the most likely token."""
    top_k: Count | None = None
    """Draw from the so many most likely tokens; null: from all."""
    top_p: Share | None = None
    """Draw from the most likely tokens that together have this probability; null: from all."""
    min_p: Share | None = None
    """Draw from tokens with at least this share of the most likely one's probability; null: from all."""
    max_new_tokens: Count = 256
    """Tokens after which a completion ends at the latest. Prompt and completion fit data.sequence_length."""
    stop: list[Text] = Field([])
    """Texts that end a completion, beside the tokenizer's eos."""
    stop_tokens: list[Text] = Field([])
    """Tokens, or their ids, that end one too."""
    fraction: Share = 1.0
    """Share of a global batch that the student writes; the rest is data.train's. At 1 data.train is not read."""
    sync_every: Count = 1
    """Optimizer steps that learn from what one state of the weights has written; a server is given them so often."""
    max_staleness: Count | None = None
    """Steps, at most, from the weights that wrote a completion to those that come of learning from it: 1 is strictly
    on-policy; null: sync_every."""
    concurrency: Count = 32
    """Completions under way at once in one model, or in one server."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.max_staleness is not None and self.sync_every > self.max_staleness:
            yield "sync_every", f"{self.sync_every} is above max_staleness = {self.max_staleness}"
        drawing = {name: getattr(self, name) for name in ("top_k", "top_p", "min_p")}
        for name, value in drawing.items():
            if self.temperature == 0 and value is not None:
                yield name, f"{value} has no effect at temperature 0, which takes the most likely token"
        if (self.server is not None) != (self.engine == "server"):
            yield "server", f"{'missing' if self.server is None else 'given'} with engine {self.engine}"
        if self.temperature == 0 and self.n > 1:
            yield "n", f"{self.n} completions of a prompt would be equal at temperature 0"

    def samples(self, global_batch_size: int) -> int:
        """Completions among the samples of a global batch."""
        if self.fraction == 1:
            return global_batch_size
        return min(max(round(self.fraction * global_batch_size), 1), global_batch_size - 1)

    def problems_in(self, config) -> Iterator[tuple[str, str]]:
        """Yields (dotted key, what is wrong) for rules between this section and the others of a run."""
        teacher, loss, train, length = config.teacher, config.loss, config.train, config.data.sequence_length
        if teacher is None or teacher.checkpoint is None or teacher.cache is not None:
            seen = "no teacher" if teacher is None else f"teacher.cache = {teacher.cache}, which holds no such samples"
            yield "rollouts", f"given with {seen}; expected a live teacher: teacher.checkpoint alone"
        if self.max_new_tokens > length:
            yield "rollouts.max_new_tokens", f"{self.max_new_tokens} leaves no room for a prompt in {length} tokens"
        if self.fraction < 1 and train.global_batch_size == 1:
            yield "rollouts.fraction", f"{self.fraction} of train.global_batch_size = 1 is no whole sample"
        rises = loss.ramps.ce_weight is not None and loss.ramps.ce_weight.to > 0
        if self.fraction == 1 and (loss.ce_weight > 0 or rises):
            yield "loss.ce_weight", "above 0 with rollouts.fraction = 1: the student's own tokens teach it nothing"
        if train.epochs is not None:
            yield "train.epochs", f"{train.epochs} with rollouts, of which there is no end; expected train.steps"
        if config.run.record_steps:
            yield "run.record_steps", f"{config.run.record_steps} with rollouts; the run keeps those it learns from"
        if self.engine == "megakd":
            yield from axes_in_the_way(config.parallel, "rollouts")
