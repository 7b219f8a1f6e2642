"""client.toml and policy.toml: what is allowed, and what each mistake gets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import ConfigError, PolicyError
from common.types import (
    Assignment,
    Capacity,
    Gradient,
    Part,
    PlanReport,
    ProbeSpec,
    ProbeTask,
    RunSpec,
    Start,
    TaskKey,
    TrainSpec,
    UnitId,
    UpdateMetrics,
)
from fp_client.agent import _named
from fp_client.config import human, load_config, need_data, need_model, need_server, parse_bytes, resolve
from fp_client.policy import Policy, load_policy

TRAIN = TrainSpec(5, 4, 128, 1e-4, 8, 16.0, ("self_attn.q_proj",), 1)
SPEC = RunSpec("r", "m", "f" * 64, "fedpruner", Part.LAYER, TRAIN, ProbeSpec(sequence_length=128), 8, 3)
KEY = TaskKey("r", 0, 0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("800MiB", 800 << 20), ("3GB", 3 * 10**9), ("1.5 GiB", 3 << 29), (17, 17), ("17", 17), ("2kib", 2048), ("0", 0)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", -1, 1.5, True, "3 XB", "1e9", None])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)


def test_human_sizes():
    assert [human(n) for n in (812 << 20, 3 << 29, 10, 4096)] == ["812 MiB", "1.50 GiB", "10 B", "4 KiB"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour = 1", "colour: unknown key"),
        ("[budget]\nhots = 1", "budget.hots: unknown key (did you mean 'host'?)"),
        ('[models."m"]\nsuorce = "x"', "models.m.suorce: unknown key (did you mean 'source'?)"),
        ("[data]\nmax_heldout = 2", "data.max_heldout: unknown key (did you mean 'max_held_out'?)"),
        ('[budget]\nhost = "a lot"', "budget.host: not a size"),
        ('threads = "two"', "threads"),
        ("threads = 0", "threads"),
        ('device = "tpu"', "device"),
        ('[models."m"]\nquantization = "nf4"', "models.m.source: missing"),
        ('[models."m"]\nsource = "x"\nquantization = "int3"', "models.m.quantization"),
        ('[data]\nsource = "d.jsonl"\nheld_out = 1.5', "data.held_out"),
        ('[data]\nsource = "d.jsonl"\non_long = "maybe"', "data.on_long"),
        ("[retry]\nattempts = 0", "retry.attempts"),
        ("server = ", "not valid TOML"),
    ],
)
def test_a_wrong_key_or_type_is_named(tmp_path, text, words):
    (tmp_path / "client.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert words in str(caught.value) and "client.toml" in str(caught.value)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ConfigError, match="fp-client join"):
        load_config(tmp_path)
    (tmp_path / "client.toml").write_text('[models."a"]\nsource = "x"\n')
    config = load_config(tmp_path)
    with pytest.raises(ConfigError, match=f"server.*`fp-client join TOKEN --dir {tmp_path}`"):
        need_server(config, tmp_path)
    with pytest.raises(ConfigError, match=r"\[data\]"):
        need_data(config, tmp_path)
    with pytest.raises(ConfigError, match=r"no model 'b' here \(has: a\)"):
        need_model(config, "b", tmp_path)


def test_paths_are_relative_to_the_device_directory(tmp_path):
    (tmp_path / "weights").mkdir()
    assert resolve("weights", tmp_path) == str(tmp_path / "weights")
    assert resolve("./other", tmp_path) == str(tmp_path / "other")
    assert resolve("d.jsonl", tmp_path) == str(tmp_path / "d.jsonl")
    assert resolve("owner/name", tmp_path) == "owner/name"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_step = 1", "max_step: unknown key (did you mean 'max_steps'?)"),
        ("max_steps = 0", "max_steps"),
        ('starts = ["warm"]', "starts"),
        ("upload_loss = 1", "upload_loss"),
    ],
)
def test_a_wrong_policy_is_named(tmp_path, text, words):
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_policy(tmp_path)
    assert words in str(caught.value) and "policy.toml" in str(caught.value)


def test_policy_is_read_or_defaults(tmp_path):
    assert load_policy(tmp_path) == Policy()
    (tmp_path / "policy.toml").write_text('models = ["m"]\nmax_steps = 5\ngradients = ["submodel"]\nstarts = ["fresh"]\n')
    policy = load_policy(tmp_path)
    assert policy.gradients == (Gradient.SUBMODEL,) and policy.starts == (Start.FRESH,)
    policy.check_plan(SPEC)


@pytest.mark.parametrize(
    ("policy", "key"),
    [
        (Policy(models=()), "models"),
        (Policy(max_steps=4), "max_steps"),
        (Policy(max_sequence_length=127), "max_sequence_length"),
        (Policy(max_batch=3), "max_batch"),
        (Policy(max_rank=7), "max_rank"),
        (Policy(max_rounds=2), "max_rounds"),
        (Policy(gradients=(Gradient.STREAMED,)), "gradients"),
        (Policy(starts=(Start.GLOBAL,)), "starts"),
    ],
)
def test_each_limit_refuses_a_run_and_says_its_key(policy, key):
    Policy().check_plan(SPEC)
    with pytest.raises(PolicyError, match=f"policy.toml: {key}:"):
        policy.check_plan(SPEC)


@pytest.mark.parametrize(("allowed", "offered"), [
    ((Gradient.SUBMODEL, Gradient.STREAMED), (Gradient.SUBMODEL, Gradient.STREAMED)),
    ((Gradient.AUTO, Gradient.SUBMODEL), (Gradient.SUBMODEL,)),
])  # fmt: skip
def test_an_auto_run_is_offered_only_the_modes_that_are_allowed(allowed, offered):
    policy = Policy(gradients=allowed)
    policy.check_plan(replace(SPEC, train=replace(TRAIN, gradient=Gradient.AUTO)))
    modes = (Gradient.SUBMODEL, Gradient.STITCHED, Gradient.STREAMED)
    report = PlanReport("r", 9, "f" * 64, tuple(Capacity(mode, 2, 4, True, 100) for mode in modes), (1, 1), 5)
    assert tuple(one.gradient for one in policy.offered(report).capacities) == offered
    for mode in modes:  # what is offered is also done, what is not is refused
        task = Assignment(KEY, (UnitId(0),), (), (), replace(TRAIN, gradient=mode), (), 4, True)
        if mode in offered:
            policy.check_assignment(task)
        else:
            with pytest.raises(PolicyError, match="gradients"):
                policy.check_assignment(task)


def test_a_policy_that_leaves_no_mode_refuses():
    auto = replace(SPEC, train=replace(TRAIN, gradient=Gradient.AUTO))
    with pytest.raises(PolicyError, match="gradients"):
        Policy(gradients=(Gradient.AUTO,)).check_plan(auto)
    report = PlanReport("r", 9, "f" * 64, (Capacity(Gradient.STREAMED, 2, 4, True, 100),), (1, 1), 5)
    with pytest.raises(PolicyError, match="the budget holds streamed, this device allows submodel"):
        Policy(gradients=(Gradient.SUBMODEL,)).offered(report)


def test_limits_hold_at_their_edge():
    Policy(max_steps=5, max_sequence_length=128, max_batch=4, max_rank=8, max_rounds=3).check_plan(SPEC)
    Policy(min_samples=10).check_samples(10)
    with pytest.raises(PolicyError, match="min_samples"):
        Policy(min_samples=10).check_samples(9)


def test_tasks_are_held_to_the_policy_too():
    task = Assignment(replace(KEY, round=3), (UnitId(0),), (), (), TRAIN, (), 4, True)
    Policy(max_rounds=4).check_assignment(task)
    with pytest.raises(PolicyError, match="max_rounds"):
        Policy(max_rounds=3).check_assignment(task)
    probe = ProbeTask(KEY, SPEC.probe, ())
    final = ProbeTask(replace(KEY, round=3), SPEC.probe, (), similarity=False)  # index = rounds: after the last that trains
    Policy(max_rounds=3).check_probe(SPEC, final)
    for refused in (replace(final, similarity=True), replace(final, key=replace(KEY, round=4))):
        with pytest.raises(PolicyError, match="max_rounds"):
            Policy(max_rounds=3).check_probe(SPEC, refused)
    loss_only = replace(probe, key=replace(KEY, round=2), similarity=False)  # every round of a run that groups nothing
    Policy(max_rounds=3).check_probe(SPEC, loss_only)
    with pytest.raises(PolicyError, match="max_rounds"):
        Policy(max_rounds=2).check_probe(SPEC, loss_only)
    with pytest.raises(PolicyError, match="upload_similarity is false, and without"):
        Policy(upload_similarity=False).check_plan(SPEC)
    Policy(upload_similarity=False).check_plan(replace(SPEC, similarity=False))
    with pytest.raises(PolicyError, match="upload_similarity"):
        Policy(upload_similarity=False).check_probe(SPEC, probe)
    Policy(upload_similarity=False).check_probe(SPEC, replace(probe, similarity=False))
    assert Policy(upload_loss=False).tells(probe) and not Policy(upload_loss=False).tells(replace(probe, similarity=False))


def test_an_evaluation_is_called_one_in_the_log() -> None:
    final, first = ProbeTask(replace(KEY, round=3), SPEC.probe, (), False), ProbeTask(KEY, SPEC.probe, (), False)
    loss_only = replace(SPEC, similarity=False)
    assert [
        _named(SPEC, replace(first, similarity=True)), _named(SPEC, Assignment(KEY, (UnitId(0),), (), (), TRAIN, (), 4, True)),
        _named(SPEC, first), _named(SPEC, final), _named(loss_only, final), _named(loss_only, first),
    ] == [
        "round 1, probe", "round 1, train",
        "before round 1, evaluation", "after round 3, evaluation", "after round 3, evaluation", "round 1, probe",
    ]  # fmt: skip


def test_what_the_policy_keeps_of_an_update() -> None:
    told = UpdateMetrics(2.0, 1.0, 5.0, 6, 7, 8.0, 9.0, 10.0, 0.5, (0.5,))
    assert Policy().redact_metrics(told) == told
    kept = Policy(upload_loss=False).redact_metrics(told)
    assert (kept.loss_first, kept.loss_last, kept.fidelity, kept.unit_fidelity) == (None, None, None, ())
    assert (kept.seconds, kept.measured_peak_bytes) == (8.0, 7)
