"""Plots of an opened run's net and queue over its own data, by name.

Each function measures; drawing and tables are those of the plot's module.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from rescom_timm.analysis import augmentations, gradients, mistakes, pair_counts, queues, similarity, style, tsne
from rescom_timm.analysis.opened_run import OpenedRun, take
from rescom_timm.analysis.run_files import Missing
from rescom_timm.contrastive.pairs import Pairs, against_queue
from rescom_timm.data.decoding import decode
from rescom_timm.data.samples import ViewsDataset
from rescom_timm.data.splits import Split
from rescom_timm.data.transforms import parse
from rescom_timm.methods.rescom import QueueConfig
from rescom_timm.text import counted

_QUERIES = 512  # training images that are compared with the queue


def contact_sheet(run: OpenedRun) -> augmentations.ContactSheet:
    """Training images, of as many classes as possible from most to fewest images, in the views that a step takes."""
    data, recipe = run.data, run.recipe
    rows = style.balanced(data.train.labels, 24, recipe.seed)
    rows = rows[np.argsort(-data.counts[data.train.labels[rows]], kind="stable")]
    policy = parse(recipe.views.train, recipe.views.mean)
    config = recipe.loader
    dataset = ViewsDataset(take(data.train, rows), policy, run.method.views, config.broken, config.reading)
    batch = dataset.__getitems__([(i, recipe.seed + i) for i in range(len(rows))])
    title, limits = f"{run.name}, views of {data.train.name}", recipe.evaluation.group_limits
    images, labels = batch["image"], batch["label"]
    return augmentations.measure(images, labels, data.counts, data.class_names, title=title, limits=limits)


def batch_pairs(run: OpenedRun) -> pair_counts.PairFrequency:
    """Pairs within the batches of the recipe, every view against every other one."""
    recipe, n = run.recipe, run.method.views
    batch, limits = recipe.train.batch_size // recipe.train.accumulate, recipe.evaluation.group_limits
    title = f"in the batch, {counted(batch, 'image')}, {counted(n, 'view')}"
    return pair_counts.measure(run.data.counts, batch, n, seed=recipe.seed, title=title, limits=limits)


def queue_pairs(run: OpenedRun) -> pair_counts.PairFrequency:
    """Pairs of a batch with the keys of the run's queue, before mining."""
    queue, counts, recipe = run.queue(), run.data.counts, run.recipe
    batch, limits = recipe.train.batch_size, recipe.evaluation.group_limits
    slots = np.bincount(queue.labels[queue.valid].cpu().numpy(), minlength=len(counts))
    title = f"against the queue ({counted(int(slots.sum()), 'key')}), {counted(batch, 'image')}"
    return pair_counts.measure(counts, batch, slots=slots, seed=recipe.seed, title=title, limits=limits)


def pair_gradients(run: OpenedRun) -> gradients.Gradients:
    """Gradients over training images, as frequent as in training, with every key of the queue (no mining)."""
    order = np.random.default_rng(run.recipe.seed).permutation(len(run.data.train.labels))
    found, labels = _against_queue(run, np.sort(order[:_QUERIES]))
    temperature, weights = run.method.pair_loss()
    n, keys = found.similarity.shape
    title = f"{run.name}: {counted(n, 'training image')} against {counted(keys, 'key')}, unmined"
    title += f", temperature {temperature:g}"
    weights = None if weights is None else weights[labels]
    return gradients.measure(*found, temperature=temperature, weights=weights, title=title)


def positive_similarity(run: OpenedRun) -> similarity.Similarity:
    """Positives of training images, as many of each class as possible, and the keys of their class in the queue."""
    rows = style.balanced(run.data.train.labels, 2 * _QUERIES, run.recipe.seed)
    found, labels = _against_queue(run, rows)
    title = f"{run.name}: training images against the keys of their class"
    return similarity.measure(*found, labels, run.data.counts, title=title, limits=run.recipe.evaluation.group_limits)


def feature_map(run: OpenedRun) -> tsne.Tsne:
    """t-SNE of the backbone's features of test images, as many of each class as possible."""
    rows = style.balanced(run.tested.labels, 2000, run.recipe.seed)
    seen = run.look(take(run.tested, rows))
    title, limits = f"{run.name}, features of {run.tested.name}", run.recipe.evaluation.group_limits
    names = tuple(run.data.class_names)
    return tsne.measure(seen.features, seen.labels, run.data.counts, names, title=title, limits=limits)


def queue_slots(run: OpenedRun) -> queues.Slots:
    """The run's queue, and the other kinds of Fig. 3 with as many slots, filled by the same data."""
    queue, counts = run.queue(), torch.as_tensor(run.data.counts)
    own = run.recipe.method.queue_kind
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


def confident_mistakes(run: OpenedRun) -> mistakes.Gallery:
    """The test images that the net misclassifies with the highest confidence."""
    split, judged = run.tested, mistakes.Judged(*run.judged)
    tiles = [_tile(run, int(i), judged) for i in mistakes.most_confident(judged, 24)]
    return mistakes.grid(f"{style.plain(run.name, 40)}: the most confident mistakes on {split.name}", tiles)


def rare_classes(run: OpenedRun) -> mistakes.Gallery:
    """The rarest classes: a training image of each, and its most confident mistakes."""
    judged, split, counts, names = mistakes.Judged(*run.judged), run.tested, run.data.counts, run.data.class_names
    rows: list[tuple[mistakes.Tile, ...]] = []
    headings = []
    for label in np.argsort(counts, kind="stable").tolist():
        if len(rows) == 8:
            break
        wrong = mistakes.of_class(judged, label, 4)
        if not len(wrong):
            continue
        first = int(np.flatnonzero(run.data.train.labels == label)[0])
        picture = _thumbnail(run, run.data.train, first)
        trained = mistakes.Tile(picture, "in training", -1, names[label], names[label], float("nan"))
        rows.append((trained, *(_tile(run, int(i), judged) for i in wrong)))
        right = 100 * float((judged.predicted[judged.labels == label] == label).mean())
        headings.append(f"{style.plain(names[label], 20)}\n{counts[label]:,} training\n{right:.0f}% right")
    if not rows:
        raise Missing("plot.no_mistakes", "the net made no mistakes")
    title = f"{style.plain(run.name, 40)}: the rarest classes with mistakes, on {split.name}"
    return mistakes.Gallery(title, tuple(headings), tuple(rows))


def _tile(run: OpenedRun, i: int, judged: mistakes.Judged) -> mistakes.Tile:
    """Of a test image."""
    split = run.tested
    return mistakes.tile(_thumbnail(run, split, i), int(split.rows[i]), judged, i, run.data.class_names)


def _thumbnail(run: OpenedRun, split: Split, i: int, side: int = 192) -> np.ndarray:
    image = decode(split.dataset[i]["image"], int(split.rows[i]), run.recipe.loader.reading)
    image.thumbnail((side, side))
    return np.asarray(image)


def _against_queue(run: OpenedRun, rows: np.ndarray) -> tuple[Pairs, Tensor]:
    """Pairs of training images, in training views, with the run's queue, and their labels; on the CPU."""
    queue = run.queue()  # Missing before anything is computed
    seen = run.look(take(run.data.train, rows), run.recipe.views.train)
    near = against_queue(seen.embeddings.to(queue.keys.device), seen.labels.to(queue.keys.device), queue)
    found = Pairs(*(part.cpu() for part in near))
    if not bool((found.positive & found.valid).any()):
        raise Missing("plot.queue", f"the queue of run {run.name} has no key of the classes of these images")
    return found, seen.labels


PLOTS: dict[str, tuple[ModuleType, Callable[[OpenedRun], object]]] = {
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
"""Name: the module that draws it, and the function that measures it."""
