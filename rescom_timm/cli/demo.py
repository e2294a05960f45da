"""A local page to try a model on images.

    rescom-timm demo MODEL [key=value ...]

MODEL: a run's folder, an exported folder or a Hub id. The page shows the most probable classes of each image with
their training images, for class frequencies as in training, uniform, or your own. It says where the model is unsure
(its prediction set has several classes) and decides by the operating point that an export keeps. If the data of a run
is available, also the nearest training images and a map (t-SNE) of the test images, with yours marked; key=value
changes the run's recipe, such as data.source=PATH. Nothing leaves this machine. Needs the extra demo:
pip install 'rescom-timm[demo]'
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rescom_timm.cli import answer, new_parser
from rescom_timm.errors import MissingPackageError

CSS = """
:root, .gradio-container { --body-text-color-subdued: var(--neutral-600); }
.dark, .dark .gradio-container { --body-text-color-subdued: var(--neutral-400); --link-text-color: #7ab2ff; }
"""
"""Gradio's own greys and links have a contrast below 4.5."""

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradio import Blocks
    from matplotlib.figure import Figure
    from torch import Tensor

    from rescom_timm.data.sources import Data
    from rescom_timm.data.splits import Split
    from rescom_timm.inference.pretrained import Pretrained


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Serve the page until Ctrl-C; returns the exit code."""
    parser = new_parser(__doc__, prog, "rescom-timm demo runs/digits_lt")
    parser.add_argument("model", help="a run's folder, an exported folder or a Hub id")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--no-data", action="store_true", help="without the run's data: no nearest images, no map")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 allows other machines")
    parser.add_argument("--revision", help="of a Hub id: a branch, a tag or a commit")
    parser.add_argument("--port", type=int, help="default: 7860, or the next free port")
    options = parser.parse_intermixed_args(argv)

    def work() -> int:
        from rescom_timm.inference.page_guard import own_uploads

        with own_uploads():
            made = page(options.model, options.overrides, not options.no_data, options.revision)
            made.launch(
                server_port=options.port, share=False, quiet=True, prevent_thread_lock=True, **guarded(options.host)
            )
            print(f"{made.local_url}  (Ctrl-C ends it)", flush=True)
            made.block_thread()
        return 0

    return answer(work)


def guarded(host: str) -> dict[str, object]:
    """Arguments of gradio's launch: listen on `host`, bound the uploads, refuse other hosts and origins."""
    from starlette.middleware import Middleware

    from rescom_timm.inference.page_guard import MAX_UPLOAD, PageGuard

    guard = Middleware(PageGuard, host=host)  # type: ignore[arg-type]
    return {"server_name": host, "max_file_size": MAX_UPLOAD, "css": CSS, "app_kwargs": {"middleware": [guard]}}


def page(model: str, overrides: Sequence[str] = (), with_data: bool = True, revision: str | None = None) -> Blocks:
    """The page, a gradio.Blocks to launch.

    Raises MissingPackageError (system.package) without the extra, and as from_pretrained does.
    """
    try:
        import gradio
        import torch
    except ImportError as error:
        raise MissingPackageError(
            "system.package", "the demo needs more packages: pip install 'rescom-timm[demo]'"
        ) from error
    from rescom_timm.inference.demo import (
        OWN_NUMBERS,
        PRIORS,
        Numbers,
        TrainingImages,
        answers,
        first_numbers,
        introduction,
        titles,
    )  # fmt: skip
    from rescom_timm.inference.neighbours import Gatherer
    from rescom_timm.inference.page_guard import DELETE_CACHE
    from rescom_timm.inference.pretrained import from_pretrained

    read = from_pretrained(model, revision=revision)
    data = run_data(Path(model), overrides) if with_data else None
    training = TrainingImages(read, data.train) if data else None
    test = ImageMap(read, data, data.test) if data and data.test is not None else None

    def show(files: list[str] | None, choice: str, numbers: Numbers, top_k: float) -> str | list[Any]:
        gatherer = Gatherer()
        cards = answers(read, files or [], choice, numbers, int(top_k), training, gatherer)
        if test is None:
            return cards
        names = dict(zip(map(str, map(Path, files or [])), titles(files or []), strict=True))
        features = torch.cat(gatherer.features) if gatherer.images else torch.empty(0)
        return [cards, test.figure({names[image]: one for image, one in zip(gatherer.images, features, strict=True)})]

    with gradio.Blocks(title=f"{model}: rescom_timm", analytics_enabled=False, delete_cache=DELETE_CACHE) as made:
        gradio.HTML(introduction(read, model))
        files = gradio.File(label="images", file_count="multiple", file_types=["image"])
        choice = gradio.Radio(list(PRIORS), value=next(iter(PRIORS)), label="how frequent are the classes?")
        numbers = gradio.Dataframe(
            first_numbers(read),
            headers=["class", "how frequent"],
            column_count=2,
            static_columns=[0],
            type="array",
            interactive=True,
            max_height=300,
            visible=False,
            label=f"{OWN_NUMBERS}: edit the second column",
        )
        top_k = gradio.Slider(1, min(10, max(2, len(read.class_names))), value=3, step=1, label="classes shown")
        cards = gradio.HTML()
        choice.change(lambda chosen: gradio.update(visible=chosen == OWN_NUMBERS), choice, numbers)
        shown = [cards]
        if test is not None:
            with gradio.Accordion("map of the test images; yours are stars, beside the nearest ones", open=True):
                shown.append(gradio.Plot(test.figure({}), show_label=False))
        for part in (files, choice, numbers, top_k):
            part.change(show, [files, choice, numbers, top_k], shown)
    return made


def run_data(run: Path, overrides: Sequence[str]) -> Data | None:
    """The data of a run; None if the model is not a run, or, with a line on stderr, if its data cannot be read."""
    from rescom_timm.api import Run

    try:
        if not (run / "checkpoints").is_dir():
            return None
        return Run(run).data(overrides)
    except (ValueError, OSError) as error:
        print(f"no nearest images and no map: the run's data cannot be read: {error}", file=sys.stderr)
        return None


class ImageMap:
    """A t-SNE map of at most 1,000 test images, on which others are marked beside their nearest ones."""

    def __init__(self, model: Pretrained, data: Data, test: Split) -> None:
        """Raises InputError (plot.value) for fewer than four test images that can be read."""
        import torch

        from rescom_timm.analysis import tsne
        from rescom_timm.inference.predict import embed

        found, names = embed(model, test, class_names=data.class_names), tuple(data.class_names)
        numbers = {name: number for number, name in enumerate(names)}
        labels = torch.tensor([numbers[label] for label in found.labels])
        self.tsne = tsne.measure(
            found.features, labels, data.counts, names, most=1000, title=test.name, limits=model.limits
        )
        self.features = torch.nn.functional.normalize(found.features[self.tsne.rows], dim=1)

    def figure(self, marks: Mapping[str, Tensor]) -> Figure:
        """Draw the map. marks: name -> features (F,) of an image, placed amid its three nearest test images."""
        from rescom_timm.analysis import tsne

        places = {}
        for name, features in marks.items():
            near = (self.features @ features).topk(min(3, len(self.features))).indices.numpy()
            x, y = self.tsne.points[near].mean(axis=0).tolist()
            places[name] = (x, y)
        return tsne.draw(self.tsne, places)
