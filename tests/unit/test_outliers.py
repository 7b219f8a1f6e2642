"""The rule over a round's updates on planted rounds, and against a twin that takes every device and module in turn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median, median_high, stdev

import numpy as np
import pytest
from scipy.stats import t as student

from fp_server.outliers import LEVEL, SHARE, Score, Shared, judge
from fp_server.products import Product, inner_products, reduced

RANK, SHAPES = 4, {"mlp.down_proj": (40, 64), "mlp.up_proj": (64, 40), "self_attn.q_proj": (40, 40), "self_attn.v_proj": (24, 40)}
Dense = dict[str, dict[tuple[int, str], np.ndarray]]


@dataclass
class Planted:
    """A round of devices that follow one gradient with noise of their own, each in a random subspace, as fresh LoRA does.

    `noise`: of a device against the gradient's 1. `kinds`: groups of devices with a gradient of their own beside the shared.
    """

    devices: int = 10
    layers: int = 12
    holds: int = 12
    noise: float = 1.0
    kinds: int = 1
    seed: int = 0
    change: dict[int, Callable[[Product], Product]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [f"d{n}" for n in range(self.devices)]

    def made(self) -> tuple[list[Shared], Dense]:
        rng = np.random.default_rng(self.seed)
        held = {name: sorted(rng.choice(self.layers, self.holds, replace=False).tolist()) for name in self.names}
        modules: list[Shared] = []
        dense: Dense = {name: {} for name in self.names}
        for layer in range(self.layers):
            holders = [name for name in self.names if layer in held[name]]
            for module, (d_out, d_in) in SHAPES.items():
                shared = rng.standard_normal((d_out, d_in))
                own = [rng.standard_normal((d_out, d_in)) for _ in range(self.kinds)]
                products: list[Product] = []
                for name in holders:
                    index = self.names.index(name)
                    gradient = shared + self.noise * rng.standard_normal((d_out, d_in))
                    if self.kinds > 1:
                        gradient += 1.5 * own[index % self.kinds]
                    a = rng.uniform(-1, 1, (RANK, d_in)) / math.sqrt(d_in)
                    one = Product(a, -1e-3 * gradient @ a.T)
                    products.append(self.change.get(index, lambda product: product)(one))
                    dense[name][layer, module] = products[-1].b @ products[-1].a
                if holders:
                    modules.append(
                        Shared(module, tuple(holders), inner_products(len(holders), lambda n, these=products: reduced(these[n])))
                    )
        return modules, dense

    def found(self, max_ratio: float = 5.0, max_whole: float = 2.0) -> list[str]:
        return sorted(judge(self.made()[0], max_ratio, max_whole)[1])


def times(factor: float) -> Callable[[Product], Product]:
    return lambda product: Product(product.a, product.b * factor)


def flipped(*devices: int, factor: float = -1.0) -> dict[int, Callable[[Product], Product]]:
    return dict.fromkeys(devices, times(factor))


# -- the twin ---------------------------------------------------------------------------------------


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float((x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y)))


def agreement(dense: Dense, device: str, among: Sequence[str]) -> list[float]:
    """A module each: the mean cosine with the others that hold it."""
    found = []
    for key, mine in dense[device].items():
        if each := [cosine(mine, dense[other][key]) for other in among if other != device and key in dense[other]]:
            found.append(mean(each))
    return found


def pair(dense: Dense, one: str, other: str) -> float | None:
    both = [cosine(dense[one][key], dense[other][key]) for key in dense[one] if key in dense[other]]
    return mean(both) if both else None


def smaller_camp(dense: Dense, devices: Sequence[str]) -> list[str]:
    """Of all ways to part the devices in two, the one with the most agreement within and the least across."""
    pairs = {
        (one, other): sum(cosine(dense[one][key], dense[other][key]) for key in dense[one] if key in dense[other])
        for one, other in itertools.combinations(devices, 2)
    }
    best, camp = -math.inf, ()
    for size in range((len(devices) + 1) // 2):
        for chosen in itertools.combinations(devices, size):
            value = sum(sum_ if (one in chosen) == (other in chosen) else -sum_ for (one, other), sum_ in pairs.items())
            if value > best + 1e-12:
                best, camp = value, chosen
    return list(camp)


def twin(dense: Dense, max_ratio: float, max_whole: float) -> tuple[dict[str, Score], dict[str, str]]:
    """Scores, and what was found: device -> "size", "whole" or "direction"."""
    left, found, most = sorted(dense), dict[str, str](), (len(dense) - 1) // 2

    def sizes(device: str) -> list[float]:
        ratios = []
        for (_, module), mine in dense[device].items():
            others = []
            for other in left:
                norms = [float(np.linalg.norm(d)) for (_, name), d in dense[other].items() if name == module]
                if other != device and norms:
                    others.append(median(norms))
            if len(others) >= 2:
                ratios.append(float(np.linalg.norm(mine)) / median_high(others))
        return ratios

    scores = {}
    for device in left:
        pairs = [p for other in left if other != device and (p := pair(dense, device, other)) is not None]
        each, ratios = agreement(dense, device, left), sizes(device)
        scores[device] = Score(
            len(pairs),
            sum(p < 0 for p in pairs),
            mean(each) if each else None,
            max(ratios) if ratios else None,
            math.sqrt(mean(x * x for x in ratios)) if ratios else None,
        )
    while len(found) < most:
        device, kind = max(left, key=lambda d: max(sizes(d), default=0.0)), "size"
        if max(sizes(device), default=0.0) <= max_ratio:
            wholes = {d: math.sqrt(mean(x * x for x in each)) for d in left if (each := sizes(d))}
            if not wholes or max(wholes.values()) <= max_whole:
                break
            device, kind = max(wholes, key=lambda d: wholes[d]), "whole"
        found[device] = kind
        left.remove(device)
    aside = smaller_camp(dense, left)
    left = [device for device in left if device not in aside]
    theirs = [mean(each) for device in left if (each := agreement(dense, device, left))]
    for device in aside:
        each = agreement(dense, device, left)
        pairs = [p for other in left if (p := pair(dense, device, other)) is not None]
        if len(pairs) < 2 or sum(p < 0 for p in pairs) * 2 <= len(pairs) or len(each) < 2 or not theirs:
            continue
        chance = float(student.cdf(mean(each) / (stdev(each) / math.sqrt(len(each))), len(each) - 1))
        if chance < LEVEL and median(theirs) > 0 and mean(each) <= -SHARE * median(theirs):
            found[device] = "direction"
    return scores, found


def near(x: float | None, y: float | None) -> bool:
    return x is None if y is None else x == pytest.approx(y, rel=1e-9)


@pytest.mark.parametrize(
    "planted",
    [
        Planted(devices=5, seed=1),
        Planted(devices=6, holds=3, seed=2, change=flipped(1)),
        Planted(devices=7, holds=5, seed=3, change=flipped(0, 6) | flipped(3, factor=50.0)),
        Planted(devices=3, layers=6, holds=6, seed=4, change=flipped(2, factor=-3.0)),
        Planted(devices=2, layers=4, holds=2, seed=5, change=flipped(1)),
        Planted(devices=4, layers=4, holds=1, seed=6),
        Planted(devices=8, holds=4, seed=7, noise=0.5, change=flipped(0, 1, 5)),
        Planted(devices=7, holds=5, seed=8, change=flipped(0, 3, factor=-2.5) | flipped(5, factor=3.0)),
        Planted(devices=6, holds=12, seed=9, change=flipped(1, factor=1.8)),
    ],
)
def test_it_is_the_twins_rule(planted: Planted) -> None:
    modules, dense = planted.made()
    scores, outliers = judge(modules, 5.0, 2.0)
    expected, found = twin(dense, 5.0, 2.0)
    for device, score in expected.items():
        assert (scores[device].others, scores[device].against) == (score.others, score.against)
        assert near(scores[device].size, score.size) and near(scores[device].agreement, score.agreement)
        assert near(scores[device].whole, score.whole)
    assert list(outliers) == list(found)
    for device, kind in found.items():
        words = {"size": " moved ", "whole": "its modules moved", "direction": "points against the others"}
        assert words[kind] in outliers[device] and (kind == "whole") == ("root mean square" in outliers[device])


# -- honest devices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("holds", [12, 4])
@pytest.mark.parametrize(("noise", "kinds"), [(1.0, 1), (5.0, 1), (1.0, 2), (2.0, 5), (2.0, 10)])
def test_honest_devices_are_not_found_out_alike_or_not(noise: float, kinds: int, holds: int) -> None:
    """A gradient of their own half again as large as the shared one, noise five times as large: of 100 updates none."""
    for seed in range(10):
        assert Planted(noise=noise, kinds=kinds, holds=holds, seed=seed).found() == []


@pytest.mark.parametrize("holds", [12, 3])
def test_devices_that_have_nothing_in_common_are_not_found_out(holds: int) -> None:
    """Noise alone: there is no majority to be against. Of 400 updates at most one is out by chance."""
    out = sum(len(Planted(noise=1e4, holds=holds, seed=seed).found(1e9, 1e9)) for seed in range(40))
    assert out <= 1


def test_a_device_with_ten_times_the_noise_is_no_outlier() -> None:
    def noisy(product: Product) -> Product:
        rng = np.random.default_rng(abs(hash(product.a.tobytes())) % 2**32)
        b = product.b + 10 * product.b.std() * rng.standard_normal(product.b.shape)
        return Product(product.a, b * (np.linalg.norm(product.b) / np.linalg.norm(b)))

    for seed in range(20):
        assert Planted(seed=seed, change={4: noisy}).found() == []


# -- attackers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [-0.5, -1.0, -4.0])
@pytest.mark.parametrize(("noise", "holds"), [(1.0, 12), (1.0, 6), (2.0, 12)])
def test_two_of_ten_that_turn_their_update_round_are_found_every_time(noise: float, holds: int, factor: float) -> None:
    for seed in range(10):
        assert Planted(noise=noise, holds=holds, seed=seed, change=flipped(2, 7, factor=factor)).found() == ["d2", "d7"]


def test_among_devices_of_two_kinds_too() -> None:
    for seed in range(10):
        assert Planted(kinds=2, seed=seed, change=flipped(2, 7)).found() == ["d2", "d7"]


@pytest.mark.parametrize("attackers", [1, 3, 4])
def test_any_minority(attackers: int) -> None:
    change = flipped(*range(attackers))
    assert Planted(change=change).found() == [f"d{n}" for n in range(attackers)]


def test_a_majority_decides_and_still_only_a_minority_is_out() -> None:
    found = Planted(change=flipped(*range(6))).found()
    assert set(found) <= {"d6", "d7", "d8", "d9"}, "six of ten say what the others are against"
    assert len(Planted(devices=4, change=flipped(0, 1)).found()) <= 1


def test_one_of_three_is_found_and_of_two_that_disagree_neither() -> None:
    assert Planted(devices=3, change=flipped(1)).found() == ["d1"]
    modules, _ = Planted(devices=2, change=flipped(1)).made()
    scores, outliers = judge(modules, 5.0, 2.0)
    assert not outliers and scores["d0"] == scores["d1"] and scores["d0"].agreement is not None
    assert scores["d0"].agreement < 0 and (scores["d0"].others, scores["d0"].against, scores["d0"].size) == (1, 1, None)


def test_units_with_two_holders_count_together_and_a_sole_holders_not_at_all() -> None:
    """Twelve layers, each held by two of six devices, every pair of neighbours sharing two: together they show who is wrong."""
    rng = np.random.default_rng(0)
    modules: list[Shared] = []
    for layer in range(12):
        pair_of = (layer % 6, (layer + 1 + layer // 6) % 6)
        gradient = rng.standard_normal((48, 32))
        products = []
        for n in sorted(pair_of):
            a = rng.uniform(-1, 1, (RANK, 32))
            products.append(Product(a, (1 if n != 3 else -1) * gradient @ a.T))
        for name in SHAPES:
            inner = inner_products(2, lambda n, these=products: reduced(these[n]))
            modules.append(Shared(name, tuple(f"d{n}" for n in sorted(pair_of)), inner + 1e-9 * rng.standard_normal()))
    assert sorted(judge(modules, 5.0, 2.0)[1]) == ["d3"]
    alone = [Shared(name, (f"d{n}",), np.array([[1.0]])) for n in range(4) for name in SHAPES]
    scores, outliers = judge(alone, 5.0, 2.0)
    assert not outliers and all(score.agreement is None and score.others == 0 for score in scores.values())


@pytest.mark.parametrize("factor", [6.0, 1e6, -1e6])
def test_an_update_that_moves_too_far_is_out_by_its_size(factor: float) -> None:
    modules, _ = Planted(change=flipped(5, factor=factor)).made()
    scores, outliers = judge(modules, 5.0, 2.0)
    assert list(outliers) == ["d5"] and "times as far as the other devices' do" in outliers["d5"]
    size = scores["d5"].size
    assert size is not None and size >= abs(factor) * 0.5
    assert Planted(change=flipped(5, factor=abs(factor))).found(1e12, 1e12) == [], "with room for it"


@pytest.mark.parametrize(("factor", "whole"), [(2.5, True), (-3.5, True), (1.3, False)])
def test_a_whole_update_may_move_less_far_than_one_module(factor: float, whole: bool) -> None:
    """Below what one module may, all of them together are too far; a little above the others' is nothing."""
    modules, _ = Planted(change=flipped(5, factor=factor)).made()
    scores, outliers = judge(modules, 5.0, 2.0)
    size, mean_square = scores["d5"].size, scores["d5"].whole
    assert size is not None and mean_square is not None and size < 5.0 and (mean_square > 2.0) is whole
    assert list(outliers) == (["d5"] if whole else [])
    if whole:
        assert f"its modules moved {mean_square:.1f} times as far" in outliers["d5"] and "at most 2 counts" in outliers["d5"]
        assert "root mean square" not in judge(modules, 5.0, 1e9)[1].get("d5", "")


@pytest.mark.parametrize(("devices", "idle"), [(3, (0,)), (5, (0, 3)), (4, (1,)), (9, (0, 2, 5, 7))])
def test_a_minority_that_hardly_moves_does_not_make_the_others_look_too_large(devices: int, idle: tuple[int, ...]) -> None:
    for seed in range(5):
        assert Planted(devices=devices, seed=seed, change=flipped(*idle, factor=1e-3)).found() == []


@pytest.mark.parametrize(("devices", "large"), [(3, (0,)), (5, (0, 3)), (4, (1,)), (9, (0, 2, 5, 7))])
def test_a_minority_that_moves_too_far_is_out_together(devices: int, large: tuple[int, ...]) -> None:
    for seed in range(5):
        assert Planted(devices=devices, seed=seed, change=flipped(*large, factor=3.0)).found() == [f"d{n}" for n in large]


def test_one_module_too_large_is_enough_and_it_is_named() -> None:
    modules, _ = Planted().made()
    place = next(k for k, m in enumerate(modules) if m.module == "self_attn.v_proj")
    inner = modules[place].inner.copy()
    inner[3, :] *= 40
    inner[:, 3] *= 40
    modules[place] = Shared("self_attn.v_proj", modules[place].devices, inner)
    _, outliers = judge(modules, 5.0, 2.0)
    assert list(outliers) == ["d3"] and outliers["d3"].startswith("a self_attn.v_proj moved 4")


def test_a_sole_holder_of_a_layer_is_measured_by_the_module_in_other_layers() -> None:
    rng = np.random.default_rng(1)
    norms = {f"d{n}": 1 + 0.1 * rng.random() for n in range(4)} | {"d2": 30.0}
    modules = [Shared("q_proj", (device,), np.array([[norm**2]])) for device, norm in norms.items()]
    assert list(judge(modules, 5.0, 2.0)[1]) == ["d2"]


def test_order_of_modules_and_devices_changes_nothing_but_rounding() -> None:
    modules, _ = Planted(holds=6, change=flipped(2, 7)).made()
    again = [Shared(m.module, m.devices[::-1], np.ascontiguousarray(m.inner[::-1, ::-1])) for m in reversed(modules)]
    assert judge(modules, 5.0, 2.0) == judge(list(modules), 5.0, 2.0)
    first, second = judge(modules, 5.0, 2.0), judge(again, 5.0, 2.0)
    assert list(first[1]) == list(second[1])
    for device, score in first[0].items():
        assert score.agreement == pytest.approx(second[0][device].agreement, rel=1e-9)


def test_who_did_nothing_to_a_module_agrees_with_nobody_there() -> None:
    modules, dense = Planted(change={1: times(0.0)}).made()
    scores, outliers = judge(modules, 5.0, 2.0)
    assert not outliers and scores["d1"] == Score(0, 0, None, 0.0, 0.0)
    del dense["d1"]
    assert near(scores["d0"].agreement, twin(dense, 5.0, 2.0)[0]["d0"].agreement)


def test_nothing_to_judge() -> None:
    assert judge([], 5.0, 2.0) == ({}, {})
    zero = [Shared("q", ("a", "b", "c"), np.zeros((3, 3)))]
    scores, outliers = judge(zero, 5.0, 2.0)
    assert not outliers and scores["a"] == Score(0, 0, None, None)
