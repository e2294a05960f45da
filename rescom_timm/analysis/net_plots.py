"""The figures of an opened run: its net and queue, looked at with its own data, by name.

Each function measures; drawing and tables are those of the figure's module.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from rescom_timm.analysis import augmentations, gradients, mistakes, pair_counts, queues, similarity, style, tsne
from rescom_timm.analysis.opened_run import Opened, take
from rescom_timm.analysis.run_files import Missing
from rescom_timm.contrastive.pairs import Pairs, against_queue
from rescom_timm.data.decoding import decode
from rescom_timm.data.samples import ViewsDataset
from rescom_timm.data.splits import Split
from rescom_timm.data.transforms import parse
from rescom_timm.methods.rescom import QueueConfig

_QUERIES = 512  # training images that are compared with the queue


def contact_sheet(run: Opened) -> augmentations.Views:
    """Training images, of as many classes as possible from most to fewest images, in the views that a step takes."""
    data, recipe = run.data, run.recipe
    rows = style.balanced(data.train.labels, 24, recipe.seed)
    rows = rows[np.argsort(-data.counts[data.train.labels[rows]], kind="stable")]
    policy = parse(recipe.views.train, recipe.views.mean)
    config = recipe.loader
    dataset = ViewsDataset(take(data.train, rows), policy, run.method.views, config.broken, config.reading)
    batch = dataset.__getitems__([(i, recipe.seed + i) for i in range(len(rows))])
    title = f"{run.name}, views of {data.train.name}"
    return augmentations.measure(
        batch["image"],
        batch["label"],
        data.counts,
        data.class_names,
        title=title,
        limits=recipe.evaluation.group_limits,
    )


def batch_pairs(run: Opened) -> pair_counts.PairFrequency:
    """Pairs within the batches of the recipe, every view against every other one."""
    batch, n = run.recipe.train.batch_size // run.recipe.train.accumulate, run.method.views
    title = f"in the batch, {batch} images, {n} view{'s' * (n > 1)}"
    return pair_counts.measure(
        run.data.counts, batch, n, seed=run.recipe.seed, title=title, limits=run.recipe.evaluation.group_limits
    )


def queue_pairs(run: Opened) -> pair_counts.PairFrequency:
    """Pairs of a batch against the keys that the run's queue holds, before mining."""
    queue, batch = run.queue(), run.recipe.train.batch_size
    slots = np.bincount(queue.labels[queue.valid].cpu().numpy(), minlength=len(run.data.counts))
    title = f"against the queue ({int(slots.sum()):,} keys), {batch} images"
    return pair_counts.measure(
        run.data.counts,
        batch,
        slots=slots,
        seed=run.recipe.seed,
        title=title,
        limits=run.recipe.evaluation.group_limits,
    )


def pair_gradients(run: Opened) -> gradients.Gradients:
    """Gradients over training images, as frequent as in training, against every key of the queue (no mining)."""
    order = np.random.default_rng(run.recipe.seed).permutation(len(run.data.train.labels))
    found, labels = _against_queue(run, np.sort(order[:_QUERIES]))
    weights = getattr(run.method, "weights", None)
    temperature = float(getattr(run.recipe.method, "temperature", 0.2))
    n, keys = found.similarity.shape
    title = f"{run.name}: {n} training images against {keys:,} keys, unmined, temperature {temperature:g}"
    weights = weights[labels] if isinstance(weights, Tensor) else None
    return gradients.measure(*found, temperature=temperature, weights=weights, title=title)


def positive_similarity(run: Opened) -> similarity.Similarity:
    """Positives of training images, as many of each class as possible, and the keys of their class in the queue."""
    rows = style.balanced(run.data.train.labels, 2 * _QUERIES, run.recipe.seed)
    found, labels = _against_queue(run, rows)
    title = f"{run.name}: training images against the keys of their class"
    return similarity.measure(*found, labels, run.data.counts, title=title, limits=run.recipe.evaluation.group_limits)


def feature_map(run: Opened) -> tsne.Tsne:
    """t-SNE of the backbone's features of test images, as many of each class as possible."""
    rows = style.balanced(run.tested.labels, 2000, run.recipe.seed)
    seen = run.look(take(run.tested, rows))
    title = f"{run.name}, features of {run.tested.name}"
    return tsne.measure(
        seen.features,
        seen.labels,
        run.data.counts,
        tuple(run.data.class_names),
        title=title,
        limits=run.recipe.evaluation.group_limits,
    )


def queue_slots(run: Opened) -> queues.Slots:
    """The run's queue as it stands, beside the other kinds of Fig. 3 with as many slots, filled by the same data."""
    queue, counts = run.queue(), torch.as_tensor(run.data.counts)
    own = getattr(getattr(run.recipe.method, "queue", None), "kind", "fifo")
    held = {f"{own} (this run)": queue.labels[queue.valid]}
    per_class = max(1, round(len(queue.keys) / len(counts)))
    generator = np.random.default_rng(run.recipe.seed)
    for kind in ("fifo", "reversed", "class_balanced"):
        if kind == own:
            continue
        other = QueueConfig(kind, per_class).build(counts, 1)
        for _ in range(max(1, run.recipe.train.epochs)):
            for part in torch.from_numpy(generator.permutation(run.data.train.labels)).split(4096):
                other.enqueue(torch.zeros(len(part), 1), part)
            if bool(other.valid.all()):
                break
        held[f"{kind} (simulated)"] = other.labels[other.valid]
    return queues.measure(held, run.data.counts, run.recipe.evaluation.group_limits)


def confident_mistakes(run: Opened) -> mistakes.Gallery:
    """Test images that are most surely taken for another class."""
    split, judged = run.tested, _judged(run)
    tiles = [_tile(run, int(i), judged) for i in mistakes.most_confident(judged, 24)]
    return mistakes.grid(f"{style.plain(run.name, 40)}: the most confident mistakes on {split.name}", tiles)


def rare_classes(run: Opened) -> mistakes.Gallery:
    """The rarest classes: a training image of each, and the images of it that are most surely taken for another."""
    judged, split, counts, names = _judged(run), run.tested, run.data.counts, run.data.class_names
    rows: list[tuple[mistakes.Tile, ...]] = []
    headings = []
    for label in np.argsort(counts, kind="stable").tolist():
        if len(rows) == 8:
            break
        wrong = mistakes.of_class(judged, label, 4)
        if not len(wrong):
            continue
        first = int(np.flatnonzero(run.data.train.labels == label)[0])
        learnt = mistakes.Tile(
            _thumbnail(run, run.data.train, first), "in training", -1, names[label], names[label], float("nan")
        )
        rows.append((learnt, *(_tile(run, int(i), judged) for i in wrong)))
        right = 100 * float((judged.predicted[judged.labels == label] == label).mean())
        headings.append(f"{style.plain(names[label], 20)}\n{counts[label]:,} training\n{right:.0f}% right")
    if not rows:
        raise Missing("every image was labelled right")
    title = f"{style.plain(run.name, 40)}: the rarest classes with mistakes, on {split.name}"
    return mistakes.Gallery(title, tuple(headings), tuple(rows))


def _judged(run: Opened) -> mistakes.Judged:
    """Of the test images."""
    return mistakes.Judged(*(column.numpy() for column in run.judge(run.tested).predictions().values()))


def _tile(run: Opened, i: int, judged: mistakes.Judged) -> mistakes.Tile:
    """Of a test image."""
    split = run.tested
    return mistakes.tile(_thumbnail(run, split, i), int(split.rows[i]), judged, i, run.data.class_names)


def _thumbnail(run: Opened, split: Split, i: int, side: int = 192) -> np.ndarray:
    image = decode(split.dataset[i]["image"], int(split.rows[i]), run.recipe.loader.reading)
    image.thumbnail((side, side))
    return np.asarray(image)


def _against_queue(run: Opened, rows: np.ndarray) -> tuple[Pairs, Tensor]:
    """Training images, seen as in training, against the run's queue: their pairs and labels, on the CPU."""
    queue = run.queue()  # Missing before anything is computed
    seen = run.look(take(run.data.train, rows), run.recipe.views.train)
    near = against_queue(seen.embeddings.to(queue.keys.device), seen.labels.to(queue.keys.device), queue)
    found = Pairs(*(part.cpu() for part in near))
    if not bool((found.positive & found.valid).any()):
        raise Missing(f"the queue of run {run.name} holds no key of the classes looked at")
    return found, seen.labels


FIGURES: dict[str, tuple[ModuleType, Callable[[Opened], object]]] = {
    "views": (augmentations, contact_sheet),
    "pairs": (pair_counts, batch_pairs),
    "queue_pairs": (pair_counts, queue_pairs),
    "queues": (queues, queue_slots),
    "similarity": (similarity, positive_similarity),
    "gradients": (gradients, pair_gradients),
    "tsne": (tsne, feature_map),
    "mistakes": (mistakes, confident_mistakes),
    "rare": (mistakes, rare_classes),
}
"""Name: the module that draws it, and how it is measured."""
