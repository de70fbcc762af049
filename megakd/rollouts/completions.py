"""One completion of one server: token ids in and out, over `/v1/completions` with `return_token_ids`.

vLLM (from 0.10.2 on) and SGLang (0.5.23) answer with `token_ids` and `prompt_token_ids` of each choice. Nothing is
tokenized: a server that read other ids than it was given, or returns none, is refused.
"""

import dataclasses

from megakd.config import Rollouts
from megakd.generation.engine import Request, Sequence, sequence_seed
from megakd.generation.stops import Stops
from megakd.rollouts.http import Refused, call

SEED_BITS = 31  # of what servers take


@dataclasses.dataclass(frozen=True)
class Completions:
    """How servers are asked, and what counts as an answer.

    Attributes:
        section: of the run, with a server section.
        stops: what ends a completion.
        vocab_size: of the student: ids are below it.
        seed: of the run.
        model: its name in requests.
    """

    section: Rollouts
    stops: Stops
    vocab_size: int
    seed: int
    model: str

    def ask(self, url: str, request: Request) -> Sequence:
        """The sequence that a server makes of a request; raises Unreachable or Refused."""
        section, seed = self.section, sequence_seed(self.seed, request)
        body = {
            "model": self.model,
            "prompt": list(request.ids),
            "max_tokens": section.max_new_tokens,
            "temperature": section.temperature,
            "top_p": section.top_p or 1.0,
            "top_k": section.top_k or -1,
            "min_p": section.min_p or 0.0,
            "repetition_penalty": 1.0,  # or what the model's generation_config.json says
            "seed": seed >> (64 - SEED_BITS),
            "stop_token_ids": sorted(self.stops.ids),
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        if self.stops.texts:
            body["stop"] = list(self.stops.texts)
        answer = call(f"{url}/v1/completions", body, seconds=self.section.server.timeout_seconds)
        try:
            return self.read(answer["choices"][0], answer, request, seed)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise Refused(f"{url} answered something that is no completion: {error}") from error

    def read(self, choice: dict, answer: dict, request: Request, seed: int) -> Sequence:
        """A choice as a sequence; ValueError where it is not what was asked for."""
        prompt, ids = (choice.get(name) or answer.get(name) for name in ("prompt_token_ids", "token_ids"))
        if not prompt or not ids:
            raise ValueError("it returns no token_ids and prompt_token_ids (vLLM from 0.10.2 on and SGLang 0.5.23 do)")
        if tuple(prompt) != request.ids:
            raise ValueError(f"it read the ids {prompt[:8]}... of a prompt that is {list(request.ids[:8])}...")
        reason = choice["finish_reason"]
        if reason not in ("stop", "length"):
            raise ValueError(f"it ended by {reason!r}")
        ids, stop = [int(i) for i in ids], choice.get("stop_reason", choice.get("matched_stop"))
        if reason == "stop" and ids[-1] not in self.stops.ids and stop in self.stops.ids:
            ids.append(stop)  # the student did write it
        if len(ids) > self.section.max_new_tokens + (reason == "stop") or not all(
            0 <= i < self.vocab_size for i in ids
        ):
            raise ValueError(f"{len(ids)} ids between {min(ids)} and {max(ids)}")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
        if not all(isinstance(logprob, int | float) for logprob in logprobs):
            logprobs = []  # not known of all: of none
        if reason == "stop" and stop is None and ids[-1] in self.stops.ids:
            stop = ids[-1]
        return Sequence(request, seed, ids, logprobs[: len(ids)], reason, stop, readable(choice.get("text")))


def readable(text) -> str:
    """As a file can hold it: no half of a character that a server has cut apart."""
    return str(text or "").encode("utf-8", "replace").decode()
