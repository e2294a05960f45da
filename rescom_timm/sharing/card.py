"""The model card: written from what a run recorded, in sections that we own and a person may take over.

A section stands between <!-- rescom_timm:NAME HASH --> and <!-- /rescom_timm:NAME -->. A new push rewrites it, unless a
person changed what is between (the hash tells) or removed it; text outside the sections is never touched. In the header
(YAML) our keys are written anew and all others stay.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from rescom_timm.data.decoding import ReadConfig
from rescom_timm.files import read_json
from rescom_timm.metrics import GROUPS_DEFINED
from rescom_timm.recipe.loading import load_dict
from rescom_timm.sharing.predict import leans
from rescom_timm.training.log import lines
from rescom_timm.training.run_folder import CHANGED

GROUPS = {"many": "more than 100", "medium": "20 to 100", "few": "fewer than 20"}
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
    """What a card tells of a run. Empty where the run did not record it."""

    repo: str
    recipe: dict[str, Any]
    environment: dict[str, Any]
    details: dict[str, Any]
    """rescom.json of the export."""
    evaluations: dict[str, dict[str, Any]]
    """<split>-<checkpoint> -> its record."""
    figures: list[str] = field(default_factory=list)
    license: str | None = None
    plain_reason: str = ""
    """Why plain timm cannot read the model; "" where it can."""

    @property
    def name(self) -> str:
        return self.repo.split("/")[-1]

    @property
    def train_name(self) -> str:
        return self.environment.get("data", {}).get("train", {}).get("name") or str(self.recipe["data"]["source"])

    @property
    def counts(self) -> list[int]:
        return self.details.get("counts") or []

    @property
    def dataset(self) -> str | None:
        """The id on the Hub of the data set, None for anything else."""
        source = str(self.recipe["data"]["source"])
        return source if re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and not Path(source).is_dir() else None

    def accuracy(self) -> float | None:
        """Top-1 in percent on the test split, of the checkpoint exported where that was evaluated."""
        exported = "-ema" if self.details.get("weights") == "ema" else ""
        for name in (f"test-best{exported}", f"test-last{exported}"):
            if name in self.evaluations:
                return self.evaluations[name]["numbers"].get("top1")
        return None


SHOWN = ("longtail", "confusion", "curves")
"""The figures that a card shows, where they are there; others are in the repository."""


def _telling(names: Iterable[str]) -> list[str]:
    """At most one picture of each of SHOWN; of other figures the first three, where none of those is there."""
    names = sorted(name for name in names if CHANGED not in name)
    chosen = [next((name for name in names if name.startswith(start)), "") for start in SHOWN]
    return [name for name in chosen if name] or names[: len(SHOWN)]


def read_facts(
    run: Path, export: Path, repo: str, license: str | None = None, plain_reason: str = ""
) -> Facts:  # fmt: skip
    """Facts of a run's folder (or its staged copy) and the export of it, with environment.json as it may be told."""
    own = sorted(path for path in run.glob("evaluation/*.json") if CHANGED not in path.name)
    evaluations = {path.stem: read_json(path) for path in own}
    evaluations = {name: record for name, record in evaluations.items() if isinstance(record.get("numbers"), dict)}
    return Facts(
        repo=repo,
        recipe=yaml.safe_load((export / "recipe.yaml").read_text(encoding="utf-8")),
        environment=_json(export / "environment.json"),
        details=_json(export / "rescom.json"),
        evaluations=evaluations or _during_training(run / "metrics.jsonl"),
        figures=_telling(path.name for path in run.glob("figures/*.png")),
        license=license,
        plain_reason=plain_reason,
    )


def write(facts: Facts, before: str | None = None) -> str:
    """The text of a card. before: the card that is there already, whose other parts are kept."""
    header, body = _split(before or "")
    if not body.strip():
        body = f"# {facts.name}\n"
    sections = dict(_sections(facts))
    fresh = "<!-- rescom_timm:" not in body
    for name, text in sections.items():
        block = f"<!-- rescom_timm:{name} {_hash(text)} -->\n{text}\n<!-- /rescom_timm:{name} -->"
        pattern = rf"<!-- rescom_timm:{name} (\w+) -->\n(.*?)\n?<!-- /rescom_timm:{name} -->"
        found = re.search(pattern, body, re.DOTALL)
        if found is None:
            body = f"{body.rstrip()}\n\n{block}\n" if fresh else body
        elif found[1] == _hash(found[2]):
            body = body[: found.start()] + block + body[found.end() :]
    return f"---\n{_header(facts, header)}---\n{body}"


def _split(card: str) -> tuple[dict[str, Any], str]:
    """The YAML header and the rest; a header that is no mapping counts as none."""
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
    if isinstance(tree, dict):
        return {key: _without_none(value) for key, value in tree.items() if value is not None}
    return [_without_none(value) for value in tree] if isinstance(tree, list) else tree


def _base_model(facts: Facts) -> str | None:
    net = facts.recipe["net"]
    if not net["pretrained"]:
        return None
    name = re.sub(r"^hf[-_]hub:", "", net["backbone"])
    return name if "/" in name and ":" not in name else (f"timm/{name}" if "." in name else None)


def _results(facts: Facts) -> list[EvalResult]:
    """What was measured on the test split, in the Hub's model-index format."""
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


def _sections(facts: Facts) -> Iterator[tuple[str, str]]:
    """(name, Markdown) of every section, in order."""
    yield "model", _model(facts)
    yield "use", _use(facts)
    yield "data", _data(facts)
    if facts.evaluations:
        yield "results", _table_of_results(facts)
    yield "limits", _limits(facts)
    yield "training", _training(facts)
    if facts.figures:
        yield "figures", "## Figures\n\n" + "\n".join(f"![{name}](figures/{name})" for name in facts.figures)


def _model(facts: Facts) -> str:
    method = facts.recipe["method"]["name"]
    told, arxiv = PAPERS.get(method, (f"the method `{method}`", None))
    start = "from timm's weights of that name" if facts.recipe["net"]["pretrained"] else "from scratch"
    progress = facts.details.get("progress") or {}
    plain = "" if facts.plain_reason else " At inference it is a plain timm model."
    return (
        f"An image classifier for {len(facts.details['class_names'])} classes: `{facts.recipe['net']['backbone']}`, "
        f"trained {start} on long-tailed data ({facts.train_name}) with {told}"
        + (f", [arXiv {arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else "")
        + f".{plain}\n\n"
        f"Checkpoint `{facts.details.get('checkpoint', '?')}`, after {progress.get('epoch', '?')} of "
        f"{facts.recipe['train']['epochs']} epochs. "
        + ("Its weights are the moving average of those trained. " if facts.details.get("weights") == "ema" else "")
        + (f"Licence: {facts.license}." if facts.license else "No licence was named for these weights.")
    )


def _use(facts: Facts) -> str:
    own = facts.recipe["net"]["backbone"].endswith("_cifar")
    note = (
        "With timm. It has no CIFAR ResNets: `import rescom_timm` (pip install rescom-timm) adds them, and without "
        "that line timm says `Unknown model`."
    )
    plain = (
        f"## Use\n\n{note if own else 'With timm alone:'}\n\n"
        f"""```python
import timm{", rescom_timm" if own else ""}
model = timm.create_model("hf-hub:{facts.repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
probabilities = model(transform(image)[None]).softmax(dim=1)   # image: a PIL image in RGB
names = model.pretrained_cfg["label_names"]
```
"""
    )
    if facts.details.get("ranks_alike"):
        plain += (
            "\nIts classifier compares directions, which timm's does not: the classes are ranked as trained, but these "
            "probabilities are not the trained ones, which rescom_timm gives.\n"
        )
    if facts.plain_reason:
        plain = f"## Use\n\nPlain timm cannot read this model ({facts.plain_reason}); rescom_timm can.\n"
    return f"""{plain}
{_pixels(facts)}

With rescom_timm, which also brings projector, queue and recipe to go on training:

```python
import rescom_timm
for found in rescom_timm.predict("{facts.repo}", "photos/"):
    print(found.image, found.labels[0], found.probabilities[0])
model = rescom_timm.from_pretrained("{facts.repo}")                    # model.net, model.recipe, model.method()
fresh = rescom_timm.from_pretrained("{facts.repo}", num_classes=7)     # other classes: a fresh classifier
```"""


def _pixels(facts: Facts) -> str:
    """Which images other readers see otherwise than rescom_timm, and so than training."""
    reading = ReadConfig.of(facts.details.get("reading", {}))
    rotated = "as it is stored, as in training; the pipeline of transformers rotates it"
    if reading.exif:
        rotated = (
            "upright, as in training, and so does the pipeline of transformers; for timm, ONNX and torch.export files, "
            "call `PIL.ImageOps.exif_transpose(image)` first"
        )
    return (
        "The scores are the same everywhere for 8-bit RGB images without an EXIF orientation. rescom_timm reads a "
        f"photograph with an EXIF orientation {rotated}. It lays transparent images on white and scales 16-bit gray "
        f"from 0..{reading.white_level or 65535} to 0..255; timm and transformers drop the transparency and clip "
        "16-bit gray at 255. An exported model cannot carry this: convert such images first."
    )


def _data(facts: Facts) -> str:
    data = facts.environment.get("data", {})
    rows = []
    for split in ("train", "validation", "test"):
        part = data.get(split)
        if part:
            imbalance = part.get("imbalance")
            ratio = "-" if imbalance is None else f"{imbalance:g}"
            rows.append(f"| {split} | {part['name']} | {part['rows']:,} | {ratio} | `{str(part['sha256'])[:12]}` |")
    counts = facts.counts
    text = "## Data\n\n| split | images from | images | largest / smallest class | sha256 of its index |\n"
    text += "|---|---|---|---|---|\n"
    text += "\n".join(rows)
    if counts:
        text += (
            f"\n\nTraining images of each of the {len(counts)} classes: {max(counts):,} to {min(counts):,}, in all "
            f"{sum(counts):,}. " + "; ".join(_group(name, counts) for name in GROUPS if _group(name, counts)) + "."
        )
        if len(counts) <= 20:
            names = facts.details["class_names"]
            pairs = ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True))
            text += f" By class: {pairs}."
    return text


def _group(name: str, counts: list[int]) -> str:
    ranges = {"many": (101, float("inf")), "medium": (20, 100), "few": (0, 19)}
    low, high = ranges[name]
    number = sum(low <= count <= high for count in counts)
    return f"{name} ({GROUPS[name]} images): {number} class{'es' * (number > 1)}" if number else ""


def _table_of_results(facts: Facts) -> str:
    columns = [name for name in TITLES if any(name in record["numbers"] for record in facts.evaluations.values())]
    head = "| split | checkpoint | images | " + " | ".join(TITLES[name] for name in columns) + " |"
    rows = []
    for record in facts.evaluations.values():
        cells = (f"{record['numbers'][name]:.2f}" if name in record["numbers"] else "-" for name in columns)
        chosen = f"{record['checkpoint']}: {record['chosen']}" if record.get("chosen") else record["checkpoint"]
        rows.append(f"| {record['split']} | {chosen} | {record.get('images', '-')} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            "## Results",
            "",
            f"In percent. {GROUPS_DEFINED}.",
            "",
            head,
            "|---" * (3 + len(columns)) + "|",
            *rows,
        ]
    )


def _limits(facts: Facts) -> str:
    few = sum(count < 20 for count in facts.counts)
    rare = f"{few} class{'es' * (few != 1)} had fewer than 20 training images"
    weak = f" {rare}; expect most errors there." if few else ""
    prior = (
        "Its probabilities are those of evenly frequent classes; where the classes' frequencies are known, give them "
        "to `rescom_timm.predict(..., prior=[...])`."
        if not leans(load_dict(facts.recipe))
        else "Its probabilities lean to the classes that were frequent in training; `rescom_timm.predict(..., "
        'prior="uniform")` takes that off.'
    )
    return (
        f"## Intended use and limits\n\nFor telling {len(facts.details['class_names'])} classes (`class_names` in "
        f"`rescom.json`) apart in images like those of {facts.train_name}, and as a start for fine-tuning.{weak} An "
        f"image of none of these classes gets one of their labels all the same. {prior} Nothing was measured beyond "
        "the table above: not other cameras or places, not bias between groups of people, not attacks. Do not let it "
        "decide about people, health or safety."
    )


def _training(facts: Facts) -> str:
    environment, recipe = facts.environment, dict(facts.recipe)
    told = []
    seconds = (facts.details.get("progress") or {}).get("seconds")
    if seconds:
        gpus = environment.get("gpus") or []
        machine = f"{len(gpus)} x {gpus[0]}" if gpus else "a CPU"
        processes = environment.get("processes", 1)
        told.append(f"Training steps took {_time(seconds)} on {machine} ({processes} process{'es' * (processes > 1)}).")
    if environment.get("packages"):
        told.append(
            "Versions: " + ", ".join(f"{name} {version}" for name, version in environment["packages"].items()) + "."
        )
    git = environment.get("git")
    if git:
        told.append(f"Code: commit `{git['commit'][:12]}`{' with local changes' if git.get('changed') else ''}.")
    command = environment.get("command", "")
    return (
        "## Training\n\n" + " ".join(told) + (f"\n\n```bash\n{command}\n```" if command else "")
        + "\n\n<details><summary>The recipe (recipe.yaml)</summary>\n\n```yaml\n"
        + yaml.safe_dump(recipe, sort_keys=False, width=120) + "```\n\n</details>"
    )  # fmt: skip


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _during_training(path: Path) -> dict[str, dict[str, Any]]:
    """The last evaluation in metrics.jsonl, for a card that is written before the run's end."""
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


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
