"""What a device's progress is worth: so many seconds of the progress timeout, by the minimum rate of its phase.

A device's clock stands at the time its progress accounts for, never later than now. Work at the minimum rate or above keeps it
at now; work below lets it fall behind, and a device that is `run.progress_timeout_seconds` behind is out of the round. So a peer
that trickles is found out as surely as one that is silent, and an honest one may be slow, or pause, and catch up.
"""

from __future__ import annotations

from fp_server.commands import ProgressSeen
from fp_server.config import RunConfig
from fp_server.roundstate import PHASES, Member

TRANSFERS = frozenset({"fetch", "push"})
"""Phases that are counted in bytes."""
STARTS = 5
"""How often in a round a device that comes back may begin its task anew; what it does again after that is no progress."""
HOUR = 3600.0


def worth(config: RunConfig, seen: ProgressSeen, most: int) -> float:
    """Seconds that a phase may have taken to get this far, at the minimum rate. `most`: bytes there are to fetch.

    A share of a phase is worth that share of the time the whole phase may take: training by `run.min_steps_per_hour`, whatever
    else has a known end by `run.round_limit_seconds`. Beyond what there is to do nothing is worth anything.
    """
    run = config.run
    if seen.phase == "push" and not seen.measured:
        return 0.0  # what has arrived the server knows better
    if seen.phase in TRANSFERS:
        amount = seen.amount if seen.phase == "push" else min(seen.amount, most)
        return amount / run.min_bytes_per_second if run.min_bytes_per_second else amount * run.progress_timeout_seconds
    if seen.total <= 0:  # nobody knows how many signs a gradient's comparison gives
        known = seen.phase == "fidelity" and config.train.fidelity
        return seen.amount * run.progress_timeout_seconds if known else 0.0
    whole = run.round_limit_seconds
    if seen.phase == "train" and run.min_steps_per_hour:
        whole = config.train.steps / run.min_steps_per_hour * HOUR
    return min(1.0, seen.amount / seen.total) * whole


def count(config: RunConfig, member: Member, seen: ProgressSeen, now: float, most: int) -> None:
    """Take in what was seen of a device: its clock goes on by what is new in it. To begin a phase is worth a whole timeout."""
    member.progress = seen
    if seen.phase not in PHASES:
        return
    reached, before = worth(config, seen, most), member.reached.get(seen.phase)
    if before is None:
        member.reached[seen.phase], member.progress_at = reached, now
    elif reached > before:
        member.reached[seen.phase], member.moved_at = reached, now
        member.progress_at = min(now, member.progress_at + reached - before)


def begin_anew(member: Member) -> None:
    """A device came back: it may have been killed, and then what it did before is no measure of its progress."""
    if member.starts < STARTS:
        member.starts += 1
        member.reached.clear()


def late(config: RunConfig, member: Member, now: float) -> str:
    """Why a device is out of the round for want of progress; empty while it is not."""
    behind, timeout = now - member.progress_at, config.run.progress_timeout_seconds
    if behind <= timeout:
        return ""
    if member.progress is None or now - member.moved_at > timeout:
        return f"no progress for {behind:.0f} s while {member.stage.value}"
    seen = member.progress
    return (
        f"too little progress while {member.stage.value}: it is {behind:.0f} s behind the least that run.min_bytes_per_second, "
        f"run.min_steps_per_hour and run.round_limit_seconds ask for ({seen.phase} {seen.amount} of {seen.total or 'unknown'})"
    )
