"""An experiment's results as a Markdown page with tables, and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from common.errors import ConfigError
from fp_client.config import human
from fp_lab.experiment import Experiment, Row
from fp_lab.results import Line
from fp_lab.runner import JobPlace, places


@dataclass(frozen=True)
class RowResults:
    """A row's jobs that have begun."""

    row: Row
    jobs: tuple[tuple[JobPlace, list[Line]], ...]

    def losses(self, after: int) -> dict[int, float]:
        """Seed -> full-model loss after so many rounds, where it was evaluated."""
        return {
            place.seed: lines[after]["loss"]
            for place, lines in self.jobs
            if len(lines) > after and lines[after]["loss"] is not None
        }

    def gains(self, after: int) -> dict[int, float]:
        """Seed -> how much lower the loss is than before the first round."""
        before = self.losses(0)
        return {seed: before[seed] - loss for seed, loss in self.losses(after).items() if seed in before}

    def devices(self, timed: bool = False) -> list[Line]:
        """What every device in every round has reported; `timed`: of the rounds whose seconds and peaks count."""
        return [one for line in (self.timed() if timed else self.lines()) for one in line.get("devices", {}).values()]

    def lines(self) -> list[Line]:
        """The lines of all rounds."""
        return [line for _, lines in self.jobs for line in lines[1:]]

    def timed(self) -> list[Line]:
        """The lines whose seconds and peaks are those of a device's worker: not the fast ones, nor those of a round that was
        interrupted and whose seconds are of what came after."""
        return [line for line in self.lines() if not line.get("fast") and _whole(line)]


def _whole(line: Line) -> bool:
    """Whether a round's seconds hold all that its devices did."""
    work = sum((one.get("probe_seconds") or 0.0) + (one.get("train_seconds") or 0.0) for one in line.get("devices", {}).values())
    return bool(line["seconds"]["devices"] >= work)


def collect(experiment: Experiment, directory: Path) -> list[RowResults]:
    """The rows with results, in the file's order."""
    found = [(place, lines) for place in places(experiment, directory) if (lines := place.lines())]
    rows = [RowResults(row, tuple(one for one in found if one[0].row.name == row.name)) for row in experiment.row]
    return [row for row in rows if row.jobs]


def default_rounds(results: Sequence[RowResults]) -> list[int]:
    """Of the rounds that were evaluated: those nearest to a third of the way and two thirds, and the last."""
    known = sorted({
        line["round"] for row in results for _, lines in row.jobs for line in lines if line["loss"] is not None and line["round"]
    })  # fmt: skip
    if not known:
        return []
    return sorted({min(known, key=lambda one: abs(one - part * known[-1])) for part in (1 / 3, 2 / 3, 1)})


def markdown(
    experiment: Experiment, results: Sequence[RowResults], rounds: Sequence[int], reference: str | None, plot: str = ""
) -> str:
    """The page. `reference`: the row whose gain is 100 %."""
    if not results:
        raise ConfigError("no job of this experiment has results yet")
    parts = [f"# {experiment.name}", _what(experiment, results)]
    if plot:
        parts.append(f"![full-model loss by round]({plot})")
    parts += ["## Full-model loss on the held-out rows", _losses(results, rounds, reference), "## Cost", _costs(results)]
    if compared := [row for row in results if any("review" in one for one in row.devices())]:
        parts += ["## Updates compared with each other", _reviews(compared)]
    return "\n\n".join(parts) + "\n"


def _reviews(results: Sequence[RowResults]) -> str:
    """Of the attackers' updates and the others': how many stood out, their mean cosine with the others, the largest size."""
    each = ["stood out", "cosine", "size", "largest module"]
    heads = ["row", "attackers'", *each, "honest", *each]
    body = []
    for row in results:
        cells = [row.row.name]
        for wanted in (True, False):
            reviews = [
                one["review"] for line in row.lines() for name, one in line["devices"].items()
                if "review" in one and (int(name[1:]) < row.row.attackers) is wanted
            ]  # fmt: skip
            cosines, wholes, sizes = (_values(reviews, key) for key in ("agreement", "whole", "size"))
            cells += [str(len(reviews)), str(sum(one["outlier"] is not None for one in reviews))]
            cells += [_spread(cosines, "{:+.4f}"), _spread(wholes, "{:.2f}"), _spread(sizes, "{:.2f}")]
        body.append(cells)
    return _table(heads, body) + (
        "\n\nUpdates over all rounds, least to most. Cosine: an update's mean over the modules shared with other devices. Size: "
        "the root mean square of its modules' norms, in medians of the other devices'; and the largest of them."
    )


def _spread(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return f"{form.format(min(known))} to {form.format(max(known))}" if known else ""


def _what(experiment: Experiment, results: Sequence[RowResults]) -> str:
    data, zero = experiment.data, [loss for row in results for loss in row.losses(0).values()]
    dealt = {"iid": "dealt at random", "verb": "by instruction verb", "source": "by source"}[data.partition]
    dealt += "" if data.partition == "iid" else f", Dirichlet({data.alpha:g})"
    count = f"{data.fewest_rows} to {data.rows_per_device}" if data.fewest_rows else str(data.rows_per_device)
    return (
        f"{experiment.model.name}, {experiment.dtype}, windows of {experiment.window} tokens; {data.devices} devices with "
        f"{count} examples each ({dealt}), {data.held_out} held-out responses that no device has. "
        f"Before the first round the loss is {_span(zero)}."
    )


def _losses(results: Sequence[RowResults], rounds: Sequence[int], reference: str | None) -> str:
    against = next((row for row in results if row.row.name == reference), None)
    if reference is not None and against is None:
        raise ConfigError(f"row {reference!r} has no results to compare with")
    heads = ["row", *(f"after {after}" for after in rounds), "gain", *([f"of {reference}'s"] if against else [])]
    body = []
    for row in results:
        last = max((after for after in rounds if row.gains(after)), default=0)
        gains = row.gains(last) if last else {}
        cells = [row.row.name, *(_seeds(row.losses(after)) for after in rounds)]
        cells.append(
            f"{fmean(gains.values()):+.3f}{'' if last == max(rounds, default=0) else f' (after {last})'}" if gains else ""
        )
        if against is not None:
            cells.append(_share(gains, against.gains(last)))
        body.append(cells)
    return (
        _table(heads, body)
        + "\n\nMean over the seeds; in brackets, each seed's. Gain: how much lower than before the first round."
    )


def _share(gains: dict[int, float], whole: dict[int, float]) -> str:
    """Mean gain over the seeds that both rows have, as a share of the other's."""
    both = sorted(gains.keys() & whole.keys())
    if not both or fmean(whole[seed] for seed in both) <= 0:
        return ""
    return f"{fmean(gains[seed] for seed in both) / fmean(whole[seed] for seed in both):.0%}"


def _seeds(losses: dict[int, float]) -> str:
    if not losses:
        return ""
    each = f" ({', '.join(f'{loss:.3f}' for _, loss in sorted(losses.items()))})" if len(losses) > 1 else ""
    return f"{fmean(losses.values()):.3f}{each}"


def _span(values: Sequence[float]) -> str:
    if not values:
        return "not known"
    low, high = min(values), max(values)
    return f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"


def _costs(results: Sequence[RowResults]) -> str:
    heads = [
        "row", "rounds", "timed", "units", "devices s", "aggregate s", "probe s", "train s", "step s", "up a round",
        "down a round", "predicted peak", "train peak", "probe peak", "fidelity",
    ]  # fmt: skip
    body = []
    for row in results:
        devices, lines, timed = row.devices(), row.lines(), row.devices(timed=True)
        seconds = [line["seconds"] for line in row.timed()]
        body.append([
            row.row.name, str(len(lines)), str(len(seconds)), _mean(map(_units, devices), "{:.0f}"),
            _mean(_values(seconds, "devices")), _mean(_values(seconds, "aggregate")), _mean(_values(timed, "probe_seconds")),
            _mean(_values(timed, "train_seconds")), _mean(_values(timed, "step_seconds"), "{:.2f}"),
            _mean(_values(lines, "bytes_up"), human), _mean(_values(lines, "bytes_down"), human),
            _most(devices, "predicted_peak"), _most(timed, "train_peak"), _most(timed, "probe_peak"),
            _mean(_values(devices, "fidelity"), "{:.3f}"),
        ])  # fmt: skip
    return _table(heads, body) + (
        "\n\nDevices and aggregate: seconds of a round, one device after another. Probe, train, step and fidelity: means over "
        "devices and rounds. Peaks: the largest seen, above the warmed process. "
        "Seconds and peaks are of the timed rounds alone: not of those that were run with --fast or interrupted."
    )


def _units(device: Line) -> int | None:
    return len(device["units"]) if "units" in device else None


def _values(found: Iterable[Line], key: str) -> list[Any]:
    return [one.get(key) for one in found]


def _mean(values: Iterable[float | None], form: str | Callable[[float], str] = "{:.1f}") -> str:
    known = [value for value in values if value is not None]
    if not known or not any(known):
        return ""
    return form.format(fmean(known)) if isinstance(form, str) else form(fmean(known))


def _most(devices: Iterable[Line], key: str) -> str:
    known = [value for value in _values(devices, key) if value]
    return human(max(known)) if known else ""


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def draw(results: Sequence[RowResults], path: Path) -> None:
    """Full-model loss by round as a PNG: each row's mean, its seeds faint behind it. Raises ConfigError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError("the plot needs matplotlib: pip install matplotlib, or leave --plot out") from None
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for row in results:
        most = max(len(lines) for _, lines in row.jobs)
        points = [(after, losses) for after in range(most) if (losses := row.losses(after))]
        (line,) = axes.plot(
            [x for x, _ in points], [fmean(y.values()) for _, y in points], marker="o", markersize=3, label=row.row.name
        )
        for place, lines in row.jobs if len(row.jobs) > 1 else ():
            seen = [(one["round"], one["loss"]) for one in lines if one["loss"] is not None]
            axes.plot(*zip(*seen, strict=True), color=line.get_color(), alpha=0.3, linewidth=0.8, label=f"_{place.label}")
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("round")
    axes.set_ylabel("full-model loss on held-out responses")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
