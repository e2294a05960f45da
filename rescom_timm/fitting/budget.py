"""What the minutes of a fit hold. Each decision is made once, from measured paces, and kept in the record."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np

from rescom_timm.data.profiles import at_most
from rescom_timm.data.sources import Data
from rescom_timm.data.splits import Split
from rescom_timm.engine.trainer import SPLITS
from rescom_timm.errors import InputError
from rescom_timm.fitting import plan
from rescom_timm.fitting.plan import FitOptions, Frozen, Reserve, Training
from rescom_timm.fitting.record import Record
from rescom_timm.fitting.training import Kind, Pace


class Budget:
    """The decisions of one fit."""

    def __init__(self, options: FitOptions, record: Record, data: Data, enough: bool) -> None:
        """enough: whether validation images choose among methods."""
        self.options, self.record, self.enough = options, record, enough
        self.labels = {
            "train": data.train.labels,
            "test": np.zeros(0, np.int64) if data.test is None else data.test.labels,
            "validation": np.zeros(0, np.int64) if data.validation is None else data.validation.labels,
        }
        self.images = {name: len(labels) for name, labels in self.labels.items()}

    @property
    def left(self) -> float:
        """Seconds."""
        return 60 * self.options.minutes - self.record.seconds

    def leave_out(self, what: str) -> None:
        """Say, and keep for the report, what there is no time for."""
        self.record.values["left_out"].append(what)
        print(f"left out: {what}", flush=True)

    # ---------------------------------------------------------------- paces

    def measured(self, backbone: str, pace: Pace) -> None:
        """Keep a pace."""
        self.record.values["paces"][backbone] = asdict(pace)
        self.record.save()

    def observed(self, backbone: str, forward: float) -> None:
        """Correct a pace by the seconds that an image took in a whole pass."""
        before = self.pace(backbone)
        self.measured(backbone, replace(before, forward=forward, step=before.step * forward / before.forward))

    def pace(self, backbone: str | None = None) -> Pace:
        """Of a backbone; None: of all together."""
        paces = [Pace(**one) for name, one in self.record.values["paces"].items() if backbone in (None, name)]
        return Pace(*(sum(getattr(one, part) for one in paces) for part in ("forward", "step", "head")))

    # ---------------------------------------------------------------- decisions

    def frozen(self, fits: int) -> Frozen:
        """What is done with the frozen nets. fits: of each head to the training images.

        Raises InputError (fit.minutes) where the time does not hold a sample of the images.
        """
        known = self.record.values
        if "frozen" not in known:
            pace = self.pace()
            forward = pace.forward / len(known["paces"])  # of the one that goes on
            evaluated, seconds = list[str](), self.left - plan.SECONDS
            for split in SPLITS:
                if forward * sum(self.images[one] for one in (*evaluated, split)) <= seconds / 3:
                    evaluated.append(split)
            seconds -= forward * sum(self.images[one] for one in evaluated)
            train, validation = (np.bincount(self.labels[split]) for split in ("train", "validation"))
            chosen = plan.frozen(seconds, pace, train, validation, fits)

            def minutes(at_most: int | None) -> int:
                needed = plan.frozen_seconds(Frozen(1, False, at_most), pace, train, validation, fits)
                return math.ceil(self.options.minutes + (needed - seconds) / 60)

            if chosen is None:
                raise InputError(
                    "fit.minutes",
                    f"--minutes {self.options.minutes:g} is too short on this machine: a sample of {plan.LEAST} images "
                    f"of each class takes about {minutes(plan.LEAST)} minutes, all images {minutes(None)}; or give a "
                    "smaller --size or --backbone",
                )
            if chosen.at_most is not None:
                part, whole = (
                    plan.taken(train, most) + plan.taken(validation, most) for most in (chosen.at_most, None)
                )
                self.leave_out(
                    f"{whole - part:,} of {whole:,} training and validation images: heads are fitted on a sample of at "
                    f"most {chosen.at_most} images a class, in which smaller classes are whole; --minutes "
                    f"{minutes(None)} would hold all"
                )
            if chosen.versions == 1:
                self.leave_out("flipped images")
            if not chosen.logistic:
                self.leave_out("logistic regression")
            for split in SPLITS:
                if split not in evaluated and self.images[split]:
                    self.leave_out(f"the {split} images at the end; rescom-timm evaluate RUN evaluates on them")
            self.record.save(frozen=asdict(chosen), evaluated=evaluated)
        return Frozen(**known["frozen"])

    def refit(self, backbone: str) -> float:
        """Return the seconds of a head re-fitted on another net."""
        passes = Frozen(**self.record.values["frozen"]).versions * self.images["train"] + self.images["validation"]
        return passes * self.pace(backbone).forward + float(self.record.values["probe_seconds"])

    def reserve(self, backbone: str) -> Reserve:
        """Return the seconds that follow the trainings."""
        forward, refit = self.pace(backbone).forward, self.refit(backbone)
        end = plan.SECONDS + forward * sum(self.images[split] for split in self.record.values["evaluated"])
        each = forward * self.images["validation"]
        # Of a training 2 evaluations and a soup; as options 2 soups, the end of the training and a re-fitted head.
        return Reserve(end + refit * self.options.use_validation, 3 * each, self.enough * (3 * each + refit))

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of trainings, the one that gets a small budget last.

        Where validation does not choose, one kind is enough: its soup with its start is the model. That from class
        means had the better soups (RESULTS.md); that from class names is WiSE-FT.
        """
        if self.enough:
            return "linear", "cosine"
        return ("linear" if self.options.class_features else "cosine",)

    def planned(self, backbone: str, workers: int = 1) -> list[Training]:
        """What the rest of the budget holds with so many workers; fixed at the first time it is asked."""
        known = self.record.values
        if "plan" not in known:
            reserve, pace = self.reserve(backbone), self.pace(backbone)
            times = 1 + self.options.use_validation
            chosen, more = (
                plan.trainings(seconds, pace, self.images, reserve, times, self.kinds, workers)
                for seconds in (self.left, self.left + 9 * 60 * self.options.minutes)
            )
            if not chosen:
                self.leave_out("training of all weights, of which no epoch fits")
            self.record.save(plan=[one._asdict() for one in chosen], more=plan.described(more))
        return [Training(**one) for one in known["plan"]]

    def holds(self, what: str, seconds: float, after: float) -> bool:
        """Whether there are so many seconds before the last `after`; else `what` is left out, also when fit goes on."""
        dropped = self.record.values["dropped"]
        if what not in dropped and seconds > self.left - after:
            dropped.append(what)
            self.leave_out(what)
        return what not in dropped


def sampled(split: Split, number: int | None) -> Split:
    """At most so many images of each class of a split."""
    if number is None:
        return split
    kept = at_most(split.labels, number)
    return replace(split, dataset=split.dataset.select(kept), labels=split.labels[kept], rows=split.rows[kept])
