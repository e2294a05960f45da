"""Robustness to corruptions: error by kind and severity, mCE, relative mCE, severity curves (paper, Table 3, Fig. 4).

A run keeps what was measured in robustness/<split>-<checkpoint>[-<folder>].json, written after every kind, so that a
long measurement can be continued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypedDict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from rescom_timm import metrics
from rescom_timm.analysis import style
from rescom_timm.analysis.opened_run import OpenedRun, take
from rescom_timm.analysis.run_files import Missing, RunFolder
from rescom_timm.data import corruptions
from rescom_timm.data.corruptions import COMMON, KINDS, SEVERITIES, Prepared
from rescom_timm.data.loaders import eval_loader
from rescom_timm.data.samples import Batch
from rescom_timm.data.splits import Split
from rescom_timm.engine.evaluate import evaluate
from rescom_timm.errors import InputError
from rescom_timm.io import read_json, refuse_links, write_json
from rescom_timm.text import counted

_FOLDER = "robustness"
# Mean top-1 error (percent) of AlexNet over the five severities of each ImageNet-C corruption, and on the clean images:
# Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019
# (arXiv 1903.12261), the constants of the authors' evaluation; clean error from their table 1.
ALEXNET_CLEAN = 43.5
ALEXNET_IMAGENET_C = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
_GROUPED = ("top1", *metrics.GROUPS)


@dataclass(frozen=True)
class Setting:
    """What was measured; two measurements of the same setting can be compared.

    split, images: of which and how many (the same ones for every kind). source: where the corrupted images come from.
    seed: of the draws.
    """

    split: str
    images: int
    source: str
    seed: int


@dataclass(frozen=True)
class Robustness:
    """A net's top-1 errors, in percent.

    clean: of the uncorrupted images, all ("top1") and by group. errors: kind -> five errors, severity 1 to 5.
    groups: many, medium, few -> kind -> five errors. chosen: how the checkpoint was chosen. weights: sha256.
    """

    run: str
    checkpoint: str
    chosen: str
    weights: str
    setting: Setting
    clean: dict[str, float]
    errors: dict[str, list[float]]
    groups: dict[str, dict[str, list[float]]]
    limits: metrics.Limits = metrics.LIMITS

    def curve(self, name: str = "top1") -> list[float]:
        """Mean error over the kinds at severity 0 (clean) to 5, of all images or of a group."""
        errors = self.errors if name == "top1" else self.groups[name]
        return [self.clean[name], *np.mean(list(errors.values()), axis=0).tolist()]


def corrupted(
    run: OpenedRun,
    split: Split,
    kinds: Sequence[str] = COMMON,
    folder: Prepared | None = None,
    limit: int | None = None,
    seed: int = 0,
    known: Robustness | None = None,
    done: Callable[[Robustness], None] = lambda _: None,
) -> Robustness:
    """Evaluate an opened run on clean and corrupted images.

    split: the clean images, which are corrupted here unless folder has the corrupted ones prepared. limit: so many
    images, the same random ones (by seed) for every kind and severity. known: an earlier result of the same setting and
    weights, whose kinds are not measured again and stay in the result. done: called after every kind with what there
    is.
    """
    for kind in kinds:
        corruptions.check_kind(kind, KINDS if folder is None else folder.kinds)
    clean = _some(split, limit, seed)
    source = corruptions.origin() if folder is None else f"read from {folder.name}, as it is"
    setting = Setting(split.name, len(clean.labels), source, seed)
    if known is None or (known.setting, known.weights) != (setting, run.weights):
        numbers = _errors(run, run.loader(clean))
        groups: dict[str, dict[str, list[float]]] = {name: {} for name in metrics.GROUPS if name in numbers}
        known = Robustness(
            run.name,
            run.checkpoint,
            run.chosen,
            run.weights,
            setting,
            numbers,
            {},
            groups,
            run.recipe.evaluation.group_limits,
        )
        done(known)
    result = known
    for kind in kinds:
        if kind in result.errors:
            continue
        found = [_errors(run, _loader(run, clean, folder, kind, severity, limit, seed)) for severity in SEVERITIES]
        errors = {**result.errors, kind: [numbers["top1"] for numbers in found]}
        by_group = {name: {**kept, kind: [numbers[name] for numbers in found]} for name, kept in result.groups.items()}
        result = replace(result, errors=errors, groups=by_group)
        done(result)
    return result


def _loader(
    run: OpenedRun, clean: Split, folder: Prepared | None, kind: str, severity: int, limit: int | None, seed: int
) -> DataLoader[Batch]:
    recipe = run.recipe
    size, config, speed = recipe.evaluation.batch_size, recipe.loader, recipe.speed
    if folder is None:
        return corruptions.corrupted_loader(clean, recipe.views, kind, severity, size, seed, config, speed)
    split = _some(folder.split(kind, severity), limit, seed)
    return eval_loader(split, corruptions.unprocessed(recipe.views), size, config, speed)


def _errors(run: OpenedRun, loader: DataLoader[Batch]) -> dict[str, float]:
    """Top-1 error of all images and of each group, in percent."""
    limits = run.recipe.evaluation.group_limits
    with run.autocast():
        meter = evaluate(run.accelerator, run.method.net, run.accelerator.prepare(loader), run.data.counts, limits)
    return {name: 100 - value for name, value in meter.compute().items() if name in _GROUPED}


def _some(split: Split, limit: int | None, seed: int) -> Split:
    """The split, or `limit` images of it by seed: the same positions of every split of one length."""
    if limit is None or limit >= len(split.labels):
        return split
    return take(split, np.sort(np.random.default_rng(seed).permutation(len(split.labels))[:limit]))


def of_kinds(found: Robustness, kinds: Iterable[str]) -> Robustness:
    """The result of these kinds alone, in the benchmark's order."""
    wanted = [kind for kind in KINDS if kind in set(kinds)]
    groups = {name: {kind: errors[kind] for kind in wanted} for name, errors in found.groups.items()}
    return replace(found, errors={kind: found.errors[kind] for kind in wanted}, groups=groups)


# -------------------------------------------------------------------------------------------------------------- numbers


def mean_error(errors: Mapping[str, Sequence[float]]) -> float:
    """Mean over kinds and severities of the top-1 error in percent: mCE without a baseline."""
    return _mean([_mean(values) for values in errors.values()])


def corruption_errors(
    errors: Mapping[str, Sequence[float]], baseline: Mapping[str, float] = ALEXNET_IMAGENET_C
) -> dict[str, float]:
    """CE of each kind (Hendrycks & Dietterich 2019, section 4.1): 100 * sum_s E_s / sum_s E_s(baseline)."""
    _same_kinds(errors, baseline)
    return {kind: 100 * _mean(errors[kind]) / baseline[kind] for kind in baseline}


def mean_corruption_error(
    errors: Mapping[str, Sequence[float]], baseline: Mapping[str, float] = ALEXNET_IMAGENET_C
) -> float:
    """Mean corruption error (mCE), the mean of corruption_errors over the kinds; 100 is the baseline itself.

    Raises InputError if the kinds differ from the baseline's: a mean over fewer kinds is another number.
    """
    return _mean(list(corruption_errors(errors, baseline).values()))


def relative_mean_corruption_error(
    errors: Mapping[str, Sequence[float]],
    clean_error: float,
    baseline: Mapping[str, float] = ALEXNET_IMAGENET_C,
    baseline_clean_error: float = ALEXNET_CLEAN,
) -> float:
    """Relative mCE (same section): errors counted from each net's own clean error (percent), before the ratio.

    mean over kinds of 100 * sum_s (E_s - E_clean) / sum_s (E_s - E_clean)(baseline).
    """
    _same_kinds(errors, baseline)
    harmless = [kind for kind, error in baseline.items() if error <= baseline_clean_error]
    if harmless:
        raise InputError("plot.baseline", f"relative mCE needs a baseline that loses accuracy on {', '.join(harmless)}")
    return _mean(
        [100 * (_mean(errors[kind]) - clean_error) / (baseline[kind] - baseline_clean_error) for kind in baseline]
    )


def _mean(values: Sequence[float]) -> float:
    if not len(values):
        raise InputError("metric.empty", "errors must have at least one corruption, each with at least one severity")
    return sum(values) / len(values)


def _same_kinds(errors: Mapping[str, Sequence[float]], baseline: Mapping[str, float]) -> None:
    missing, extra = sorted(set(baseline) - set(errors)), sorted(set(errors) - set(baseline))
    if missing or extra:
        raise InputError(
            "plot.baseline",
            f"the corruptions differ from the baseline's {len(baseline)}: missing {', '.join(missing) or 'none'}; not "
            f"in the baseline {', '.join(extra) or 'none'}",
        )
    lengths = {len(values) for values in errors.values()}
    if len(lengths) > 1:
        raise InputError("plot.baseline", f"every corruption needs as many severities, not {sorted(lengths)}")


class Summary(TypedDict, total=False):
    """Metrics of a result, in percent; kinds: how many count. From baseline (its name) on, only with one."""

    kinds: int
    clean_error: float
    mean_error: float
    baseline: str
    corruption_errors: dict[str, float]
    mCE: float
    relative_mCE: float | None


def summary(found: Robustness, baseline: Robustness | str | None = None) -> Summary:
    """The metrics of a result, in percent: clean_error and mean_error over kinds and severities.

    With a baseline also corruption_errors, mCE and relative_mCE (normalised by errors minus the clean one; None if the
    baseline loses nothing on a kind). baseline: another net's result, or "alexnet" for the errors that normalise
    ImageNet-C's mCE. Only the fifteen common kinds count in mCE. Raises InputError for a baseline of other images or
    kinds.
    """
    common = {kind: errors for kind, errors in found.errors.items() if kind in COMMON}
    counted = common or found.errors
    numbers: Summary = {
        "kinds": len(counted),
        "clean_error": found.clean["top1"],
        "mean_error": mean_error(counted),
    }
    if baseline is None:
        return numbers
    if isinstance(baseline, Robustness):
        if baseline.setting != found.setting:
            raise InputError(
                "plot.baseline", f"the baseline was measured on {baseline.setting}, the run on {found.setting}"
            )
        name, clean = baseline.run, baseline.clean["top1"]
        reference = {kind: float(np.mean(errors)) for kind, errors in baseline.errors.items() if kind in COMMON}
    elif baseline == "alexnet":
        name, clean, reference = "AlexNet on ImageNet-C", ALEXNET_CLEAN, ALEXNET_IMAGENET_C
    else:
        raise InputError("plot.baseline", f"baseline must be a run or alexnet, not {baseline!r}")
    numbers["baseline"] = name
    numbers["corruption_errors"] = corruption_errors(common, reference)
    numbers["mCE"] = mean_corruption_error(common, reference)
    numbers["relative_mCE"] = None
    if all(error > clean for error in reference.values()):
        numbers["relative_mCE"] = relative_mean_corruption_error(common, found.clean["top1"], reference, clean)
    return numbers


# ---------------------------------------------------------------------------------------------------------------- files


def path_of(run: Path, split: str, checkpoint: str, folder: Prepared | None = None) -> Path:
    """Where a run keeps a result."""
    end = f"-{folder.name}" if folder else ""
    return run / _FOLDER / f"{split}-{checkpoint}{end}.json"


def read(path: Path, run: str = "") -> Robustness | None:
    """The result in a file, None if there is no file. run: its name in plots. Raises InputError for a damaged file."""
    if not path.is_file():
        return None
    try:
        plain = read_json(path)
        plain["limits"] = metrics.read_limits(plain.get("limits"))
        fields = {name: plain[name] for name in Robustness.__dataclass_fields__}
        found = Robustness(**{**fields, "setting": Setting(**plain["setting"])})
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            "plot.robustness", f"{path} is no result of rescom-timm robustness ({error}): delete it and measure again"
        ) from None
    return replace(found, run=run) if run else found


def write(path: Path, found: Robustness, numbers: Summary) -> None:
    """Write a result and its metrics as JSON, atomically. path: in a run's robustness/.

    Raises an error if that is a symlink out of the run's folder.
    """
    refuse_links(path.parent.parent, [path.parent.name])
    write_json(path, {**asdict(found), "figures": numbers})


# -------------------------------------------------------------------------------------------------------------- picture


def measure(runs: Sequence[RunFolder]) -> list[Robustness]:
    """The first result of each run, with the setting of the first run's, reduced to their common kinds.

    Raises Missing if there is none.
    """
    found: list[Robustness] = []
    for run in runs:
        results = [read(path, run.name) for path in sorted((run.path / _FOLDER).glob("*.json"))]
        usable = [one for one in results if one and one.errors and (not found or one.setting == found[0].setting)]
        found += usable[:1]
    if not found:
        raise Missing(
            "plot.robustness", f"no robustness of {', '.join(run.name for run in runs)}: rescom-timm robustness RUN"
        )
    kinds = [kind for kind in KINDS if all(kind in one.errors for one in found)]
    if not kinds:
        raise Missing("plot.robustness", "the runs were measured on different corruptions")
    return [of_kinds(one, kinds) for one in found]


def table(found: Sequence[Robustness]) -> style.Table:
    """One row per run, kind and severity; kind clean has severity 0."""
    rows: list[tuple[object, ...]] = []
    for one in found:
        names = ("top1", *one.groups)
        rows.append((one.run, "clean", 0, *(one.clean.get(name) for name in _GROUPED)))
        for kind in one.errors:
            for place, severity in enumerate(SEVERITIES):
                values = {name: (one.errors if name == "top1" else one.groups[name])[kind][place] for name in names}
                rows.append((one.run, kind, severity, *(values.get(name) for name in _GROUPED)))
    columns = ("run", "kind", "severity", "error_percent", *(f"error_{name}_percent" for name in metrics.GROUPS))
    return dict(zip(columns, zip(*rows, strict=True), strict=True))


def draw(found: Sequence[Robustness]) -> Figure:
    """Mean error by severity, one line a run (a single run's groups too), and each run's kinds by severity."""
    kinds, one = list(found[0].errors), found[0]
    figure = style.new_figure(5.4 + 3.4 * len(found), max(4.2, 1.6 + 0.24 * len(kinds)))
    left, *right = figure.subplots(1, 1 + len(found), width_ratios=[1.5, *[1] * len(found)], squeeze=False)[0]
    for index, result in enumerate(found):
        left.plot([0, *SEVERITIES], result.curve(), style.line(index), color=style.color(index) if len(found) > 1 else
                  "black", marker="o", markersize=4, linewidth=1.8, label=style.plain(result.run, 40)
                  if len(found) > 1 else "all")  # fmt: skip
    if len(found) == 1:
        rules = style.group_labels(one.limits)
        for name in one.groups:
            left.plot([0, *SEVERITIES], one.curve(name), color=style.GROUP_COLORS[name], linewidth=1.2,
                      marker=style.GROUP_MARKERS[name], markersize=4, label=rules[name])  # fmt: skip
    left.set_ylim(0, 100)
    left.set_xticks([0, *SEVERITIES], ["clean", *map(str, SEVERITIES)])
    what = f"mean over {counted(len(kinds), 'kind')}, {counted(one.setting.images, 'image')} of {one.setting.split}"
    style.tidy(left, f"{style.plain(one.run, 50) if len(found) == 1 else 'Severity curves'}\n{style.plain(what, 70)}",
               "severity", "top-1 error (percent)", "y")  # fmt: skip
    left.legend(frameon=False, fontsize=8, loc="upper left")
    for index, (panel, result) in enumerate(zip(right, found, strict=True)):
        title = f"{style.plain(result.run, 30)}: " if len(found) > 1 else ""
        mean = np.mean(list(result.errors.values()))
        _heat(panel, result, f"{title}error by kind\nmean {mean:.1f} percent", names=index == 0)
    return figure


def _heat(panel: Axes, found: Robustness, title: str, names: bool) -> None:
    errors = np.array(list(found.errors.values()))
    panel.imshow(errors, cmap="Blues", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    for (row, column), error in np.ndenumerate(errors):
        panel.text(column, row, f"{error:.0f}", ha="center", va="center", fontsize=7,
                   color="white" if error > 60 else "black")  # fmt: skip
    style.tidy(panel, title, "severity", "")
    panel.set_xticks(range(len(SEVERITIES)), list(map(str, SEVERITIES)))
    panel.set_yticks(
        range(len(errors)), [kind.replace("_", " ") for kind in found.errors] if names else [""] * len(errors)
    )
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
