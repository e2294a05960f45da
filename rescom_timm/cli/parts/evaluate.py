"""What `evaluate` computes from the kept logits: another prior or temperature, and abstention."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
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
)
from rescom_timm.metrics import Meter, span


def adjusted(
    options: argparse.Namespace, run: Path, name: str, meter: Meter, class_names: list[str]
) -> tuple[str, Meter]:
    """(title, evaluation) of softmax(s / T + log prior). Raises InputError (predict.prior, data.split)."""
    kept, counts, classes = logits.read(run, name), meter.counts, meter.num_classes
    even = even_shift(Run(run).recipe, counts, classes)
    temperature = _temperature(options, run, even)
    prior = read_prior(options.prior, class_names)
    if prior == "estimate":
        found = torch.cat([values for values, _ in kept.batches()]) + even.float()
        log_prior = estimated_prior(found, temperature).log()
    else:
        log_prior = -even if prior is None else frequencies(prior, counts, classes).log()
    shift = (log_prior + even / temperature).float()
    title = f"the same with temperature {temperature:.3g}" + (f", prior {options.prior}" if options.prior else "")
    title += f", approximate: from the {kept.values.shape[1]} largest logits" if kept.approximate else ""
    return title, kept.judged(counts, meter.limits, shift, temperature)


def _temperature(options: argparse.Namespace, run: Path, even: Tensor) -> float:
    if options.temperature != "fitted":
        return float(options.temperature)
    name = file_name("validation", options.checkpoint, options.weights)
    if not logits.place(run, name).is_file():
        words = f"--split validation --checkpoint {options.checkpoint}"
        message = f"a temperature is fitted on validation images: first run rescom-timm evaluate {run} {words}"
        raise InputError("data.split", message)
    found, labels = zip(*logits.read(run, name).batches(), strict=True)
    return fitted_temperature(torch.cat(found) + even.float(), torch.cat(labels))


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
