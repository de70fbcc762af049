"""EleutherAI's lm-eval on our own engine: its requests, scored and generated at any layout.

Every rank runs lm-eval alike; the models (data-parallel ranks) share the requests of each kind and tell each other what
they found. Imported only where lm-eval is installed (`pip install "megakd[eval]"`).
"""

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Sequence

import lm_eval
import numpy as np
import torch
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megakd.data.tokenizers.tokenizer import Tokenizer
from megakd.errors import ConfigError
from megakd.generation.engine import Engine, Request
from megakd.generation.scoring import score
from megakd.generation.stops import Stops
from megakd.kernels.next_tokens import Choice
from megakd.models.gpt import GPT

NEW_TOKENS = 256  # of generate_until where a task says nothing, as in lm-eval


class Adapter(TemplateLM):
    """What lm-eval asks of a model.

    Args:
        gpt: this rank's part, of Megatron's local layers and without sequence parallelism.
        tokenizer: of the model.
        groups: process groups.
        device: of the model.
        batch_size: sequences at once in one model.
    """

    def __init__(self, gpt: GPT, tokenizer: Tokenizer, groups, device, batch_size: int):
        super().__init__()
        self.gpt, self.text, self.groups, self.place, self.slots = gpt, tokenizer, groups, device, batch_size
        self.longest = gpt.config.model.max_sequence_length

    @property
    def eot_token_id(self) -> int:
        known = (i for i in (self.text.eos_id, self.text.bos_id) if i is not None)
        return next(known, 0)

    def tok_encode(self, string: str, add_special_tokens=None, **unused) -> list[int]:
        """Ids without bos; names of special tokens are these tokens, as in a chat template's text."""
        return self.text.encode(string, special=True)

    def _loglikelihood_tokens(self, requests, **unused) -> list[tuple[float, bool]]:
        return self._shared([(context, continuation) for _, context, continuation in requests], self._score)

    def _score(self, pairs: list) -> list[tuple[float, bool]]:
        """Contexts that are too long lose their beginning."""
        fitting = [self._fitted(*pair) for pair in pairs]
        return score(self.gpt, self.groups, self.place, fitting, self.slots)

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        whole = [*context, *continuation][-(self.longest + 1) :]
        kept = max(len(whole) - len(continuation), 1)
        return whole[:kept], whole[kept:]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.longest, 1):
                windows.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._shared(windows, self._score), strict=True):
            totals[number] += logprob
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        return self._shared([request.args for request in requests], self._write)

    def _write(self, asked: list) -> list[str]:
        """Texts, those with equal settings together."""
        texts = [""] * len(asked)
        for key in dict.fromkeys(json.dumps(settings, sort_keys=True) for _, settings in asked):
            numbers = [n for n, (_, settings) in enumerate(asked) if json.dumps(settings, sort_keys=True) == key]
            choice, stops, new = self._settings(json.loads(key))
            engine = Engine(
                self.gpt, self.groups, self.place, choice, stops, max_new_tokens=new, slots=self.slots, seed=0
            )
            contexts = [(n, self.tok_encode(asked[n][0])[-(self.longest - new) :]) for n in numbers]
            requests = [Request(n, 0, tuple(ids or [self.prefix_token_id])) for n, ids in contexts]
            for finished in engine.run(requests):
                for sequence in finished:
                    texts[sequence.request.prompt] = sequence.text
        return texts

    def _settings(self, given: dict) -> tuple[Choice, Stops, int]:
        """How a task wants its texts written.

        Raises:
            ConfigError: it asks for what the engine does not do.
        """
        given = dict(given)
        until, new = given.pop("until", []), int(given.pop("max_gen_toks", NEW_TOKENS))
        drawn = given.pop("do_sample", given.get("temperature", 0) > 0)
        temperature = float(given.pop("temperature", 1.0)) if drawn else 0.0
        given.pop("temperature", None)
        filters = {name: given.pop(name, None) for name in ("top_k", "top_p", "min_p")}
        if given:
            raise ConfigError(f"a task asks for {', '.join(given)} in generation_kwargs", hint="the engine has none")
        texts = [until] if isinstance(until, str) else until
        ids = frozenset({self.text.eos_id} - {None})
        new = min(new, self.longest - 1)
        return Choice(temperature, **filters), Stops(self.text, ids, tuple(t for t in texts if t)), new

    def _shared(self, items: Sequence, work: Callable[[list], list]) -> list:
        """What `work` makes of all items, each done by one of the models.

        Collectives: one gather of pickled results over data-parallel ranks.
        """
        dp = self.groups.dp
        mine = work(list(items[dp.rank() :: dp.size()]))
        everyone: list = [None] * dp.size()
        dist.all_gather_object(everyone, mine, group=dp)
        found = [None] * len(items)
        for rank, theirs in enumerate(everyone):
            found[rank :: dp.size()] = theirs
        return found


def open_tasks(names: Sequence[str], folder: str | None, hint: str = "--task-folder FOLDER") -> TaskManager:
    """What finds the tasks.

    Args:
        folder: with further tasks as YAML files; None: lm-eval's own.
        hint: how the user names it.
    Raises:
        ConfigError: there is no such task.
    """
    manager = TaskManager(include_path=folder)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ConfigError(f"lm-eval has no task {', '.join(unknown)}", hint=f"{hint} brings more")
    return manager


def run_tasks(adapter: Adapter, names: Sequence[str], manager: TaskManager, limit: int | None) -> dict[str, dict]:
    """lm-eval's results: task -> metric -> value; it gives them to the first rank of each machine, the others get {}.

    Args:
        limit: documents of each task; None: all.
    """
    with random_states_kept(adapter.place):
        found = lm_eval.simple_evaluate(
            adapter, tasks=list(names), task_manager=manager, limit=limit, log_samples=False
        )
    if found is None:
        return {}
    return {
        task: {name: value for name, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }


@contextlib.contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """lm-eval seeds everything that draws; a run that trains on goes on with its own states."""
    known = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(known[0])
        np.random.set_state(known[1])
