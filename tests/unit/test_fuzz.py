"""The fuzz targets under hypothesis, a few hundred cases each, always the same; and every input that ever found something.

`make fuzz` (tests/fuzz) goes on from there, guided by coverage.
"""

from __future__ import annotations

import inspect
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp_client.agent import Work
from fp_client.rpc import Session
from fp_client.rpc_objects import Transfer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "contract")]

from fuzz.agent import FakeSession, FakeTransfer, FakeWork, agent, agent_seeds  # noqa: E402
from fuzz.decoders import TARGETS, Target  # noqa: E402
from fuzz.pushes import pushes, pushes_seeds  # noqa: E402
from fuzz.session import session, session_seeds  # noqa: E402

MACHINES = {
    "session": Target(session, session_seeds, 400),
    "pushes": Target(pushes, pushes_seeds, 600),
    "device's agent": Target(agent, agent_seeds, 1500),
}
FOUND = HERE.parent / "fuzz" / "seeds"
"""A folder a target, a file an input that once was a finding."""


@pytest.fixture(autouse=True)
def quiet():
    """A warning a message is what these are about."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(before)


def mutated(target):
    """Arbitrary bytes, and valid inputs with pieces replaced, cut and doubled."""
    seeds = st.sampled_from(target.seeds())
    cut = st.tuples(seeds, st.integers(0, 4000), st.integers(0, 40), st.binary(max_size=24))
    return st.one_of(st.binary(max_size=200), seeds, cut.map(lambda t: t[0][: t[1]] + t[3] + t[0][t[1] + t[2] :]))


@pytest.mark.parametrize("name", TARGETS)
def test_a_decoder_decodes_or_refuses(name):
    target = TARGETS[name]

    @settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(mutated(target))
    def check(data):
        target.run(data)

    check()


@pytest.mark.parametrize("name", MACHINES)
def test_a_state_machine_survives_whatever_is_said(name):
    target = MACHINES[name]

    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.tuples(st.sampled_from(target.seeds()), st.binary(max_size=80)).map(lambda t: t[0] + t[1]))
    def check(data):
        target.run(data)

    check()


@pytest.mark.parametrize("name", [*TARGETS, *MACHINES])
def test_the_seeds_are_valid(name):
    target = {**TARGETS, **MACHINES}[name]
    for seed in target.seeds():
        target.run(seed)


@pytest.mark.parametrize("path", sorted(FOUND.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_once_is_mended(path):
    {**TARGETS, **MACHINES}[path.parent.name].run(path.read_bytes())


@pytest.mark.parametrize(("machine", "seeds"), [(session, session_seeds), (pushes, pushes_seeds)])
def test_a_whole_run_is_among_the_sessions_seeds(monkeypatch, machine, seeds):
    """Else the fuzzer would never see a round committed."""
    from fuzz import session as module

    seen = []
    check = module.Case._check_log
    monkeypatch.setattr(
        module.Case, "_check_log", lambda self: (seen.append(len(self.log.of(module.e.RoundCommitted))), check(self))
    )
    for seed in seeds():
        machine(seed)
    assert max(seen) >= 1


def test_a_push_is_among_the_daemons_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the fuzzer would never see a device train and send what it trained."""
    pushed = []
    push = FakeTransfer.push

    async def noted(self: FakeTransfer, *given: Any) -> bool:
        pushed.append(given)
        return await push(self, *given)

    monkeypatch.setattr(FakeTransfer, "push", noted)
    for seed in agent_seeds():
        agent(seed)
    assert pushed


@pytest.mark.parametrize(("fake", "real"), [(FakeWork, Work), (FakeTransfer, Transfer), (FakeSession, Session)])
def test_the_daemons_fakes_take_what_the_real_ones_take(fake: type, real: type) -> None:
    """Else a call of the daemon's that is right would be a finding."""
    for name, method in vars(fake).items():
        if inspect.isfunction(method) and (name == "__aiter__" or not name.startswith("_")):
            assert [*inspect.signature(method).parameters] == [*inspect.signature(getattr(real, name)).parameters], name
