"""What NVIDIA's ft_launcher is told of a rank: which section of the run it is in, so that it can end one that hangs.

ft_launcher (nvidia-resiliency-ext) puts a monitor beside every rank, which kills it when a section stays open for too
long. Section `setup` lasts from the start until the first step has been taken; `step` is each of what repeats: the data
of a step, the step, a batch of validation, a turn of rollouts or of recording; a save is `checkpointing`. Everything
else is in no section. Sections that the launcher was given no limit for are not sent.
"""

import logging
from collections.abc import Mapping

from megakd.ranks.pulse import STEADY

SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"  # set by ft_launcher: where this rank's monitor listens
LOG = logging.getLogger("megakd")


class Sections:
    """Follows the marks of a Pulse and tells the monitor.

    A monitor that does not answer is told nothing more: SIGTERM to the launch ends the monitors at once, and the ranks
    have a checkpoint to write.

    Args:
        client: connected.
        failure: what the client raises.
    """

    def __init__(self, client, failure: type[Exception]):
        self._client, self._failure = client, failure
        self._limited = set(client.cfg.rank_section_timeouts)
        self._beats = client.cfg.initial_rank_heartbeat_timeout or client.cfg.rank_heartbeat_timeout
        self._open, self._phase, self._is_set_up = None, "", False
        self._enter("setup")

    def mark(self, phase: str) -> None:
        """The main thread begins `phase`."""
        self._is_set_up = self._is_set_up or self._phase in ("step", "record") or phase == "end"
        self._phase = phase
        if self._is_set_up:
            self._enter("step" if phase in STEADY else "checkpointing" if phase == "save" else None)
        if phase == "end":
            self._tell("shutdown_workload_monitoring")
        elif self._beats:
            self._tell("send_heartbeat")

    def _enter(self, section: str | None) -> None:
        if self._open is not None:
            self._tell("end_section", self._open)
        self._open = section if section in self._limited else None
        if self._open is not None:
            self._tell("start_section", self._open)

    def _tell(self, message: str, *arguments: str) -> None:
        if self._client is None:
            return
        try:
            getattr(self._client, message)(*arguments)
        except (self._failure, OSError) as error:
            LOG.warning("ft_launcher's monitor of this rank does not answer, and is told nothing more: %s", error)
            self._client = None


def watched_sections(environ: Mapping[str, str]) -> Sections | None:
    """Connected to this rank's monitor; None where ft_launcher has not started it, or cannot be told (then warned)."""
    if SOCKET not in environ:
        return None
    try:
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient, RankMonitorClientError
    except ImportError as error:
        LOG.warning("ft_launcher hears nothing of this rank and watches its exit alone: %s", error)
        return None
    client = RankMonitorClient()
    try:
        client.init_workload_monitoring()
    except (RankMonitorClientError, OSError) as error:
        LOG.warning("ft_launcher's monitor cannot be reached at %s, and watches nothing: %s", environ[SOCKET], error)
        return None
    return Sections(client, RankMonitorClientError)
