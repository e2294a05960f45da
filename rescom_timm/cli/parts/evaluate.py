"""What `evaluate` computes from the kept logits: another prior or temperature, abstention, other decisions."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from rescom_timm.api import Run
from rescom_timm.cli.parts.predict import read_prior
from rescom_timm.engine import logits
from rescom_timm.engine.evaluate import file_name
from rescom_timm.errors import InputError
from rescom_timm.inference.decisions import (
    coverage_table,
    estimated_prior,
    even_shift,
    fitted_temperature,
    frequencies,
    shift_of,
)
from rescom_timm.inference.rules import Rule, operating_point, price, read_costs
from rescom_timm.io import write_json
from rescom_timm.metrics import Meter, span


def adjusted(
    options: argparse.Namespace, run: Path, name: str, meter: Meter, class_names: list[str]
) -> tuple[str, Meter]:
    """(title, evaluation) of softmax(s / T + log prior). Raises InputError (predict.prior, data.split)."""
    kept = logits.read(run, name)
    shift, temperature = _scale(options, run, kept, meter, class_names)
    title = f"the same with temperature {temperature:.3g}" + (f", prior {options.prior}" if options.prior else "")
    title += f", approximate: from the {kept.values.shape[1]} largest logits" if kept.approximate else ""
    return title, kept.judged(meter.counts, meter.limits, shift, temperature)


def _scale(
    options: argparse.Namespace, run: Path, kept: logits.Logits, meter: Meter, class_names: list[str]
) -> tuple[Tensor, float]:
    """(shift (K,), T) of the probabilities softmax(s / T + shift) that the options ask for."""
    even = even_shift(Run(run).recipe, meter.counts, meter.num_classes)
    asked = options.temperature or ("fitted" if options.costs else 1.0)
    if asked == "fitted":
        found, labels = _validation(options, run).whole()
        temperature = fitted_temperature(found + even.float(), labels)
    else:
        temperature = float(asked)
    prior = read_prior(options.prior, class_names)
    if prior == "estimate":
        share: Tensor | None = estimated_prior(kept.whole()[0] + even.float(), temperature)
    else:
        share = None if prior is None else frequencies(prior, meter.counts, meter.num_classes)
    return shift_of(share, even, temperature), temperature


def _validation(options: argparse.Namespace, run: Path) -> logits.Logits:
    """The kept logits of the checkpoint's validation images. Raises InputError (data.split) where there are none."""
    name = file_name("validation", options.checkpoint, options.weights)
    if not logits.place(run, name).is_file():
        words = f"--split validation --checkpoint {options.checkpoint}"
        message = f"this needs the logits of validation images: first run rescom-timm evaluate {run} {words}"
        message += ", or give --temperature 1" if options.costs else ""
        raise InputError("data.split", message)
    return logits.read(run, name)


def decided(options: argparse.Namespace, run: Path, name: str, meter: Meter, class_names: list[str]) -> str:
    """What --recall or --costs changes, on the validation images that it was found on and on the evaluated ones.

    Also written to RUN/evaluation/price/NAME.json. Raises InputError (predict.classes, predict.calibration,
    predict.costs, data.split).
    """
    kept = {name: logits.read(run, name)}
    shift, temperature = _scale(options, run, kept[name], meter, class_names)
    rule: Rule
    if options.costs:
        rule = read_costs(options.costs, class_names)
        lines = [f"{rule.text}, temperature {temperature:.3g}"]
    else:
        known = _validation(options, run)
        rule = operating_point(*known.whole(), options.recall, class_names)
        lines = [rule.text]
        kept = kept if options.split == "validation" else {"validation": known} | kept
    prices = {
        where: price(rule, found, class_names, meter.counts, meter.limits, shift, temperature)
        for where, found in kept.items()
    }
    for where, found in prices.items():
        lines += [f"{where}, {found.images:,} images:", found.text]
    path = run / "evaluation" / "price" / f"{name}.json"
    record = {"rule": rule.text, "temperature": temperature, "prior": options.prior}
    write_json(path, record | {where: found.record() for where, found in prices.items()})
    return "\n".join([*lines, str(path)])


def abstention(meter: Meter) -> str:
    """What is right among the surest images, of all and of each group, and how many of its images are kept."""
    kept = meter.predictions()
    labels, right = kept["labels"].numpy(), (kept["labels"] == kept["predicted"]).numpy()
    counts = None if meter.counts is None else meter.counts.numpy()
    lines = []
    for row in coverage_table(kept["confidence"].numpy(), right, labels, counts, meter.limits):
        if row["group"] == "all":
            lines.append(f"surest {row['kept']:.0f}% (probability from {row['threshold']:.3f}):")
        risk = "none kept"
        if row["images"]:
            ends = span((float(row["low"]), float(row["high"])))
            risk = f"{row['risk']:.1f}% wrong ({ends}; n {row['images']:,})"
        lines[-1] += f"  {row['group']} {row['share']:.0f}% kept, {risk}"
    return "\n".join(["abstaining on all but", *lines])
