"""A budget that changes while the daemon runs: SIGHUP has ``client.toml`` read again.

Of it `[budget]` and `cache.max_spill` are taken up; whatever else has changed waits for the next start. A task under way goes on
with what it was planned for; the server asks before the next round what the device can hold.
"""

from __future__ import annotations

import logging
from pathlib import Path

from common.errors import ConfigError
from fp_client.agent import Agent
from fp_client.config import human, load_config
from fp_client.work import LocalWork

log = logging.getLogger(__name__)


async def take_up(directory: Path, work: LocalWork, agent: Agent) -> bool:
    """Read the file again; whether the budget is another. A file that is wrong changes nothing, and the log says what is."""
    try:
        config = load_config(directory)
    except ConfigError as error:
        log.error("%s; the budget is what it was", error)
        return False
    before = work.budget_bytes
    if not work.rebudget(config):
        log.info("client.toml was read again: the budget is what it was")
        return False
    log.info("the budget is %s, it was %s; the server is told before the next round", _said(work.budget_bytes), _said(before))
    await agent.replan()
    return True


def _said(budget: int) -> str:
    return human(budget) if budget else "without a bound"
