"""One log line for a person about each committed event."""

from __future__ import annotations

import logging

from common.types import Capacity
from fp_server import events as e

logger = logging.getLogger("fp_server")


def tell(event: e.Event) -> None:
    """One log line for a person about what was committed."""
    match event:
        case e.RunStarted():
            logger.info("run %s started: %s, %d layers", event.run, event.manifest.name, event.manifest.layers)
        case e.PlanReceived():
            said = event.report.refusal or ", ".join(map(_capacity, event.report.capacities))
            logger.info("device %s can hold: %s (%d samples)", event.device, said, event.samples)
        case e.RoundOpened():
            what = f"round {event.key.round + 1}, attempt {event.attempt}"
            if event.evaluate:
                what = f"evaluation after {event.key.round} rounds"
            logger.info("%s opened with %s", what, ", ".join(event.drawn))
        case e.ProbeReceived():
            logger.info("device %s: full-model loss %.4f", event.device, event.loss)
        case e.Assigned():
            logger.info("device %s gets %s, gradient %s", event.device, " ".join(u.label for u in event.units), event.gradient)
        case e.UpdateAccepted():
            logger.info("device %s: update of %.1f MiB accepted", event.device, event.ref.size / 2**20)
        case e.UpdatesLost():
            for device, why in sorted(event.lost.items()):
                logger.error("the update of %s is lost and asked for again: %s", device, why)
        case e.DeviceDropped():
            logger.warning("device %s is out of round %d: %s", event.device, event.key.round + 1, event.message)
        case e.RoundClosed():
            logger.info("round %d closed: %s", event.key.round + 1, event.reason)
        case e.UpdatesReviewed():
            for device, reason in event.outliers.items():
                what = "is left out" if event.reject else "stands out"
                logger.warning("device %s: its update of round %d %s: %s", device, event.key.round + 1, what, reason)
        case e.RoundCommitted():
            logger.info("round %d committed: %d layers changed", event.key.round + 1, len(event.units))
        case e.RunPaused():
            logger.warning("run %s is paused: %s", event.run, event.reason)
        case e.RunResumed():
            logger.info("run %s goes on", event.run)
        case e.RunEnded():
            logger.info("run %s %s%s", event.run, event.outcome, f": {event.reason}" if event.reason else "")


def _capacity(capacity: Capacity) -> str:
    predicted = f" at {capacity.step_seconds:.1f} s a step" if capacity.step_seconds else ""
    return f"{capacity.gradient} {capacity.units} units{predicted}"
