"""Every wrong key of a run file or server.toml is named, with what it was and what it may be."""

from __future__ import annotations

import json
import math

import pytest

from common import config as configuration
from common.checkpoint import dump_manifest, load_manifest
from common.config import parse
from common.errors import ConfigError, ModelError
from common.types import Gradient, ModelManifest, ModuleShape, Part
from fp_server.config import RunConfig, ServerConfig

GOOD = '[run]\nname = "r"\nrounds = 3\n[model]\nname = "m"\nmanifest = "m.json"\n'
MODULES = tuple(ModuleShape(n, 4, 4) for n in ("mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj"))
MANIFEST = ModelManifest("m", "llama", 2, 4, 8, MODULES, "ab" * 32)


def config(extra: str = "", base: str = GOOD) -> RunConfig:
    return parse(base + extra, RunConfig, "run.toml")


BAD = [
    ("[run]\ncolour = 1\n", "run.toml: not valid TOML"),
    ("[lora]\ncolour = 1\n", "run.toml: lora.colour: unknown key"),
    ("[colours]\n", "colours: unknown key"),
    ("[train]\nstpes = 3\n", "run.toml: train.stpes: unknown key (did you mean 'steps'?)"),
    ("[limtis]\nx = 3\n", "limtis: unknown key (did you mean 'limits'?)"),
    ("[lora]\nrank = '8'\n", "lora.rank: Input should be a valid integer (got '8')"),
    ("[lora]\nrank = 8.5\n", "lora.rank"),
    ("[lora]\nrank = 0\n", "lora.rank: Input should be greater than or equal to 1 (got 0)"),
    ("[lora]\nrank = true\n", "lora.rank"),
    ("[lora]\ndropout = 1.0\n", "lora.dropout: Input should be less than 1"),
    ("[lora]\nalpha = inf\n", "lora.alpha"),
    ("[lora]\nalpha = nan\n", "lora.alpha"),
    ("[train]\nlearning_rate = inf\n", "train.learning_rate"),
    ("[lora]\ntrain = 'A'\n", 'lora: train = "A" with start = "fresh" changes nothing: B stays 0'),
    ("[lora]\nstart = 'cold'\n", "lora.start: Input should be 'fresh' or 'global' (got 'cold')"),
    (
        "[train]\ngradient = 'exact'\n",
        "train.gradient: Input should be 'submodel', 'stitched', 'streamed' or 'auto' (got 'exact')",
    ),
    ("[train]\nstep_seconds = -1.0\n", "train.step_seconds"),
    ("[train]\nfidelity = 1\n", "train.fidelity: Input should be a valid boolean"),
    ("[limits]\nupdate_bytes = -1\n", "limits.update_bytes"),
    ("[pruning]\nunits = 'ffn'\n", "pruning.units: Input should be 'layer' or 'component' (got 'ffn')"),
    ("[pruning]\ngroup_sizes = 'odd'\n", "pruning.group_sizes: Input should be 'free' or 'even'"),
    ("[pruning]\neigenvectors = 'k+1'\n", "pruning.eigenvectors: Input should be 'k' or 'k-1'"),
    ("[limits]\nmin_holders = 0\n", "limits.min_holders"),
    ("[limits]\nmax_update_norm = -1.0\n", "limits.max_update_norm"),
    ("[limits]\nmax_samples = 0\n", "limits.max_samples"),
    ("[limits]\noutliers = 'maybe'\n", "limits.outliers"),
    ("[limits]\nmax_norm_ratio = 1.0\n", "limits.max_norm_ratio"),
]


@pytest.mark.parametrize(("extra", "said"), BAD)
def test_what_is_wrong_is_named(extra, said):
    with pytest.raises(ConfigError) as caught:
        config(extra)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("devices_per_round = 2.5", "run.devices_per_round: must be a fraction up to 1.0 or a whole number"),
        ("devices_per_round = 0.0", "run.devices_per_round"),
        ("quorum = 1.5", "run.quorum"),
        ("seed = -1", "run.seed"),
        ("method = 'other'", "run.method: no such method (there are: fedpruner, random) (got 'other')"),
        ("progress_timeout_seconds = inf", "run.progress_timeout_seconds"),
    ],
)
def test_what_is_wrong_in_the_run_section(line, said):
    with pytest.raises(ConfigError) as caught:
        config(base=GOOD.replace("rounds = 3", f"rounds = 3\n{line}"))
    assert said in str(caught.value)


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        config("[lora]\nrank = 0\ncolour = 1\n", GOOD.replace("rounds = 3", "rounds = 0"))
    assert all(part in str(caught.value) for part in ("run.rounds", "lora.rank", "lora.colour: unknown key"))


@pytest.mark.parametrize("lines", ['name = "m"', 'name = "m"\npath = "a"\nmanifest = "b"'])
def test_a_model_has_one_source(lines):
    with pytest.raises(ConfigError, match=r"give either path .* or manifest"):
        config(base=f'[run]\nname = "r"\nrounds = 3\n[model]\n{lines}\n')


def test_targets_are_found_by_their_last_name_or_in_full():
    assert config().targets(MANIFEST) == tuple(m.name for m in MODULES)
    assert config('[lora]\ntargets = ["q_proj", "mlp.up_proj"]\n').targets(MANIFEST) == ("mlp.up_proj", "self_attn.q_proj")
    with pytest.raises(ConfigError, match=r"lora.targets: the model has no module 'proj' \(it has: mlp.up_proj"):
        config('[lora]\ntargets = ["proj"]\n').targets(MANIFEST)
    with pytest.raises(ConfigError, match="at least one"):
        config("[lora]\ntargets = []\n")


def test_the_learning_rate_is_a_cosine_over_the_rounds():
    run = config("[train]\nlearning_rate = 1.0\nfinal_learning_rate = 0.0\n")
    assert [run.learning_rate(i) for i in range(3)] == pytest.approx([1.0, 0.5, 0.0])
    assert config("[train]\nlearning_rate = 1.0\n", GOOD.replace("3", "1")).learning_rate(0) == 1.0
    assert math.isfinite(run.learning_rate(2))


def test_what_the_run_file_says_of_the_gradient_reaches_the_devices():
    run = config(
        "[train]\ngradient = 'stitched'\nstep_seconds = 2.5\nfidelity = true\n"
        "[limits]\nupdate_bytes = 1000000\n[pruning]\nunits = 'component'\n"
    ).run_spec(MANIFEST)
    assert (run.train.gradient, run.step_seconds, run.update_bytes, run.train.fidelity) == (Gradient.STITCHED, 2.5, 10**6, True)
    assert run.part is run.probe.part is not Part.LAYER
    plain = config().run_spec(MANIFEST)
    assert (plain.train.gradient, plain.step_seconds, plain.update_bytes) == (Gradient.AUTO, 0.0, 0)
    assert (plain.train.fidelity, plain.part) == (False, Part.LAYER)


def test_an_update_limit_counts_whole_layers_and_must_hold_one():
    """A layer: three modules of 4×4 at rank 16 in fp32."""
    layer = 3 * (4 + 4) * 16 * 4

    def units(limit, kind="layer"):
        run = config(f"[limits]\nupdate_bytes = {limit}\n[pruning]\nunits = '{kind}'\n")
        run.check(MANIFEST)
        return run.units_by_update(MANIFEST)

    assert units(0) is None and units(layer) == 1 and units(3 * layer - 1) == 2 and units(2 * layer, "component") == 4
    with pytest.raises(ConfigError, match=f"limits.update_bytes: {layer - 1} holds no layer: one takes {layer} bytes"):
        units(layer - 1)


def test_how_many_devices_are_drawn():
    def drawn(value, roster):
        return config(base=GOOD.replace("rounds = 3", f"rounds = 3\ndevices_per_round = {value}")).drawn(roster)

    assert [drawn(0.1, n) for n in (1, 14, 16, 100)] == [1, 1, 2, 10]
    assert drawn(1.0, 7) == 7 and drawn(3, 7) == 3 and drawn(9, 7) == 7


def test_the_server_file():
    assert parse('names = ["a"]', ServerConfig, "server.toml").port == 7443
    for text, said in [
        ("", "names: missing"), ("names = []", "names"), ('names = ["a"]\nport = 70000', "port"),
        ('names = ["a"]\nprot = 1', "prot: unknown key"), ('names = "a"', "names: Input should be a valid"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            parse(text, ServerConfig, "server.toml")


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.toml: no such file"):
        configuration.load(tmp_path / "run.toml", RunConfig)
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="can't be read"):
        configuration.load(tmp_path / "run.toml", RunConfig)


def test_manifests(tmp_path):
    path = tmp_path / "m.json"
    with pytest.raises(ModelError, match="fp-client manifest"):
        load_manifest(path)
    path.write_text(dump_manifest(MANIFEST))
    assert load_manifest(path) == MANIFEST
    good = json.loads(path.read_text())
    for change in ({"layers": 0}, {"fingerprint": "x"}, {"modules": []}, {"modules": [{"name": "a"}]}, {"layers": "many"}):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ModelError, match="not a model manifest"):
            load_manifest(path)
