"""JSON over HTTP, as servers of completions speak it."""

import http.client
import json
import urllib.error
import urllib.request

from megakd.limits import excess, limit

LONGEST_ANSWER = 400  # characters of one that are quoted
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # servers are neighbours: no proxy knows them


class Unreachable(Exception):
    """A server did not answer, or with an error of its own (5xx): it may be asked again.

    Attributes:
        gone: nobody took the connection, or it broke: whoever answers there next may be a new process.
    """

    def __init__(self, text: str, *, gone: bool = False):
        super().__init__(text)
        self.gone = gone


class Refused(Exception):
    """A server answered that a request is wrong, or something that is no answer to it."""


def call(url: str, body=None, *, seconds: float):
    """The JSON that a server answers; None for an answer without content or of another kind.

    Args:
        body: what is posted as JSON; None: get.
        seconds: that the answer may take, from the last byte to the next.
    Raises:
        Unreachable, Refused: with what was seen.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with OPENER.open(request, timeout=seconds) as answer:
            content = answer.read(limit("ANSWER_BYTES") + 1)
    except urllib.error.HTTPError as error:
        kind = Unreachable if error.code >= 500 or error.code == 429 else Refused
        raise kind(f"{url} answered {error.code} {error.reason}: {body_of(error)}") from error
    except (OSError, http.client.HTTPException) as error:  # a refused connection, a reset one, a time that has passed
        reason = getattr(error, "reason", None) or error
        gone = isinstance(reason, ConnectionError | http.client.HTTPException)
        raise Unreachable(f"{url}: {reason or type(error).__name__}", gone=gone) from error
    if words := excess("ANSWER_BYTES", len(content)):
        raise Refused(f"{url} answered more than is read: {words}")
    try:
        return json.loads(content)
    except ValueError:
        return None
    except RecursionError as error:
        raise Refused(f"{url} answered JSON of too many levels") from error


def body_of(error: urllib.error.HTTPError) -> str:
    """The beginning of what came with an error, as far as it came."""
    try:
        return error.read(4 * LONGEST_ANSWER).decode(errors="replace")[:LONGEST_ANSWER]
    except (OSError, http.client.HTTPException) as broken:
        return f"(and then {broken or type(broken).__name__})"
