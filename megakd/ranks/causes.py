"""What the error of a collective says of its cause."""

PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)
TIMED_OUT = (
    "Application timeout caused pair closure",
    "Timed out waiting",
    "Watchdog caught collective operation timeout",
)


def says(error: BaseException | None, texts: tuple[str, ...]) -> bool:
    """True when this error, or what caused it, has one of the texts."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if any(text in str(error) for text in texts):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """The first line of a message that may have none, without gloo's advice."""
    return str(error).partition("\n")[0].partition(". This is typically")[0]
