"""The model card, regenerated at each push; the user's edits are kept.

A section is between <!-- rescom_timm:NAME HASH --> and <!-- /rescom_timm:NAME -->. A push rewrites it unless its text
was edited (the hash differs) or removed; text outside the sections stays. In the YAML header our keys are rewritten and
all others stay. The template text/card.md escapes all values; of several end markers the one whose hash matches counts,
so that no value can fake the end of a section.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from rescom_timm.config.loading import load_dict
from rescom_timm.data.decoding import ReadConfig
from rescom_timm.engine.collapse import dead, last_state
from rescom_timm.engine.log import duration, lines
from rescom_timm.engine.run_folder import CHANGED
from rescom_timm.hub_client import hub_id
from rescom_timm.inference.decisions import leans
from rescom_timm.inference.rules import Costs, read_point
from rescom_timm.io import read_json
from rescom_timm.metrics import INTERVALS_DEFINED, Limits, group_rules, groups, groups_defined, read_limits, span
from rescom_timm.text import counted, escape_controls
from rescom_timm.text.pages import markdown, render

TITLES = {
    "top1": "top-1", "top5": "top-5", "many": "many", "medium": "medium", "few": "few",
    "mean_class": "mean of classes", "ece": "calibration error",
}  # fmt: skip
PAPERS = {
    "rescom": (
        "ResCom (Siamese Balanced Softmax, and a supervised contrastive loss over a class-balanced queue with hard "
        "pair mining; Zhong et al., *Rebalanced Siamese Contrastive Mining for Long-Tailed Recognition*, 2022)",
        "2203.11506",
    ),
    "balanced_softmax": (
        "Balanced Softmax (Ren et al., *Balanced Meta-Softmax for Long-Tailed Visual Recognition*, 2020)",
        "2007.10740",
    ),
}


@dataclass(frozen=True)
class Facts:
    """The values of a card; empty if the run did not record them."""

    repo: str
    recipe: dict[str, Any]
    environment: dict[str, Any]
    details: dict[str, Any]
    """rescom.json of the export."""
    evaluations: dict[str, dict[str, Any]]
    """<split>-<checkpoint> -> its record."""
    figures: list[str] = field(default_factory=list)
    license: str | None = None
    contrast: dict[str, float] = field(default_factory=dict)
    """The last logged state of the contrastive branch; see engine.collapse.last_state."""
    plain_reason: str = ""
    """Why plain timm cannot read the model; "" if it can."""

    @property
    def name(self) -> str:
        """The model's name: the repository without its owner."""
        return self.repo.split("/")[-1]

    @property
    def train_name(self) -> str:
        """The training data's name."""
        return self.environment.get("data", {}).get("train", {}).get("name") or str(self.recipe["data"]["source"])

    @property
    def counts(self) -> list[int]:
        """(K,) training images of each class, or empty."""
        return self.details.get("counts") or []

    @property
    def limits(self) -> Limits:
        """Of the groups many, medium and few."""
        return read_limits(self.recipe.get("evaluation", {}).get("group_limits"))

    @property
    def dataset(self) -> str | None:
        """The Hub id of the data set; None for other sources."""
        try:
            found = hub_id(str(self.recipe["data"]["source"]))
        except ValueError:
            return None
        return found and found.partition("@")[0]

    def accuracy(self) -> float | None:
        """Top-1 in percent on the test split, of the exported checkpoint if it was evaluated."""
        exported = "-ema" if self.details.get("weights") == "ema" else ""
        for name in (f"test-best{exported}", f"test-last{exported}"):
            if name in self.evaluations:
                return self.evaluations[name]["numbers"].get("top1")
        return None


SHOWN = ("longtail", "confusion", "curves")
"""The plots that a card shows, if the run has them; others are in the repository."""


def _shown(names: Iterable[str]) -> list[str]:
    """At most one plot of each of SHOWN; without any, the first three others."""
    names = sorted(name for name in names if CHANGED not in name)
    chosen = [next((name for name in names if name.startswith(start)), "") for start in SHOWN]
    return [name for name in chosen if name] or names[: len(SHOWN)]


def read_facts(
    run: Path, export: Path, repo: str, license: str | None = None, plain_reason: str = ""
) -> Facts:  # fmt: skip
    """Facts of a run's folder (or its staged copy) and its export, with the published environment.json."""
    own = sorted(path for path in run.glob("evaluation/*.json") if CHANGED not in path.name)
    evaluations = {path.stem: read_json(path) for path in own}
    evaluations = {name: record for name, record in evaluations.items() if isinstance(record.get("numbers"), dict)}
    return Facts(
        repo=repo,
        recipe=yaml.safe_load((export / "recipe.yaml").read_text(encoding="utf-8")),
        environment=_json(export / "environment.json"),
        details=_json(export / "rescom.json"),
        evaluations=evaluations or _during_training(run / "metrics.jsonl"),
        figures=_shown(path.name for path in run.glob("figures/*.png")),
        license=license,
        contrast=last_state(lines(run / "metrics.jsonl")),
        plain_reason=plain_reason,
    )


def write(facts: Facts, before: str | None = None) -> str:
    """The text of a card. before: the present card, whose other parts are kept."""
    header, body = _split(before or "")
    if not body.strip():
        body = f"# {markdown(facts.name)}\n"
    blocks = {name: _block(name, text) for name, text in _sections(facts).items()}
    if "<!-- rescom_timm:" not in body:
        body = "\n\n".join([body.rstrip(), *blocks.values()]) + "\n"
    else:
        for name, where in sorted(_found(body).items(), key=lambda found: -found[1].start):
            body = body[: where.start] + blocks.get(name, body[where]) + body[where.stop :]
    return f"---\n{_header(facts, header)}---\n{body}"


def _split(card: str) -> tuple[dict[str, Any], str]:
    """The YAML header and the rest; a header that is not a mapping is ignored."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    if match is None:
        return {}, card
    try:
        header = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return {}, card[match.end() :]
    return (header if isinstance(header, dict) else {}), card[match.end() :]


def _header(facts: Facts, before: dict[str, Any]) -> str:
    tags = ["image-classification", "timm", "rescom_timm", "long-tailed"]
    old = before.get("tags") or []
    ours = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license=facts.license,
        datasets=[facts.dataset] if facts.dataset else None,
        base_model=_base_model(facts),
        metrics=["accuracy"] if facts.evaluations else None,
        tags=list(dict.fromkeys([*tags, *(old if isinstance(old, list) else [old])])),
        model_name=facts.name,
        eval_results=_results(facts) or None,
    ).to_dict()
    ours.pop("model_name", None)
    ours.pop("eval_results", None)
    kept = before.get("model-index")
    if isinstance(kept, list) and "model-index" in ours:
        ours["model-index"] += [entry for entry in kept if entry.get("name") != facts.name]
    return yaml.safe_dump({**before, **_without_none(ours)}, sort_keys=False, allow_unicode=True, width=120)


def _without_none(tree: Any) -> Any:
    """The tree without None values and control characters."""
    if isinstance(tree, dict):
        return {key: _without_none(value) for key, value in tree.items() if value is not None}
    if isinstance(tree, list):
        return [_without_none(value) for value in tree]
    return escape_controls(tree) if isinstance(tree, str) else tree


def _base_model(facts: Facts) -> str | None:
    net = facts.recipe["net"]
    if not net["pretrained"]:
        return None
    name = re.sub(r"^hf[-_]hub:", "", net["backbone"])
    return name if "/" in name and ":" not in name else (f"timm/{name}" if "." in name else None)


def _results(facts: Facts) -> list[EvalResult]:
    """Results on the test split, in the Hub's model-index format."""
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=facts.dataset or "custom",
            dataset_name=record["split"],
            dataset_config=facts.recipe["data"].get("subset"),
            dataset_split=facts.recipe["data"]["test"],
            metric_type="accuracy",
            metric_name=f"{TITLES[metric]} ({record['checkpoint']})",
            metric_value=round(value, 4),
        )
        for name, record in facts.evaluations.items()
        for metric, value in record["numbers"].items()
        if name.startswith("test-") and metric in TITLES and metric != "ece"
    ]


# ------------------------------------------------------------------------------------------------------------ sections


def _sections(facts: Facts) -> dict[str, str]:
    """Markdown of every section by name, in order."""
    environment, recipe, details = facts.environment, facts.recipe, facts.details
    data, gpus = environment.get("data", {}), environment.get("gpus") or []
    progress = details.get("progress") or {}
    values: dict[str, Any] = {
        "facts": facts,
        "recipe": recipe,
        "recipe_text": yaml.safe_dump(recipe, sort_keys=False, width=120),
        "details": details,
        "names": details["class_names"],
        "counts": facts.counts,
        "paper": PAPERS.get(recipe["method"]["name"]),
        "progress": progress,
        "rule": _rule(details),
        "reading": ReadConfig.of(details.get("reading", {})),
        "own_net": recipe["net"]["backbone"].endswith("_cifar"),
        "splits": [(name, data[name]) for name in ("train", "validation", "test") if data.get(name)],
        "groups": _groups(facts),
        "columns": {
            name: title
            for name, title in TITLES.items()
            if any(name in record["numbers"] for record in facts.evaluations.values())
        },
        "groups_defined": groups_defined(facts.limits),
        "intervals_defined": INTERVALS_DEFINED,
        "span": span,
        "dead": dead(facts.contrast),
        "few": sum(count < facts.limits[0] for count in facts.counts),
        "few_below": facts.limits[0],
        "leans": leans(load_dict(recipe)),
        "time": duration(progress.get("seconds") or 0),
        "machine": f"{len(gpus)} x {gpus[0]}" if gpus else "a CPU",
        "processes": environment.get("processes", 1),
        "packages": environment.get("packages") or {},
        "git": environment.get("git"),
        "command": environment.get("command", ""),
    }
    names = ["model", "use", "data", *(["results"] if facts.evaluations else []), "limits", "training"]
    names += ["figures"] if facts.figures else []
    return {name: render("card.md", section=name, **values).strip("\n") for name in names}


def _rule(details: dict[str, Any]) -> str:
    """The decision rule of an export as text; "" without one."""
    if "operating_point" in details:
        return read_point(details["operating_point"], details["class_names"]).text
    return Costs.text if "costs" in details else ""


def _groups(facts: Facts) -> list[str]:
    rules = group_rules(facts.limits)
    return [
        f"{name} ({rules[name]} images): {counted(len(classes), 'class')}"
        for name, classes in groups(facts.counts, facts.limits).items()
    ]


def _during_training(path: Path) -> dict[str, dict[str, Any]]:
    """The last evaluation in metrics.jsonl, for a card written before the run ends."""
    for line in reversed(lines(path)):
        splits = {key.split("/")[0] for key in line if key.startswith(("test/", "validation/"))}
        if splits:
            return {
                f"{split}-during": {
                    "split": split,
                    "checkpoint": "during training",
                    "chosen": f"epoch {line['epoch']}",
                    "numbers": {k.split("/", 1)[1]: v for k, v in line.items() if k.startswith(f"{split}/")},
                }
                for split in sorted(splits)
            }
    return {}


def _json(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}


def _block(name: str, text: str) -> str:
    return f"<!-- rescom_timm:{name} {_hash(text)} -->\n{text}\n<!-- /rescom_timm:{name} -->"


def _found(body: str) -> dict[str, slice]:
    """The positions of unedited sections. A section ends where the hash of its text equals that of its start."""
    found: dict[str, slice] = {}
    position = 0
    while start := re.compile(r"<!-- rescom_timm:(\w+) (\w+) -->\n").search(body, position):
        end = f"<!-- /rescom_timm:{start[1]} -->"
        ends = [mark.start() for mark in re.finditer(end, body[start.end() :])]
        whole = [at for at in ends if _hash(body[start.end() : start.end() + at].removesuffix("\n")) == start[2]]
        position = start.end() + (whole + ends)[0] + len(end) if ends else start.end()
        if whole:
            found.setdefault(start[1], slice(start.start(), position))
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
