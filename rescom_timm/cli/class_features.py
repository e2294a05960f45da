"""Class features from class names, by CLIP's text tower.

    rescom-timm class-features CLASSES --model MODEL -o FILE [--prompt "a {}."]

A classifier over a frozen CLIP or SigLIP image tower can start from the text features of the class names:
net.classifier.init=file net.classifier.file=FILE.

CLASSES: an index with class names, a recipe (path or name), or a text file with one name a line, in the order of the
classes. MODEL: a CLIP or SigLIP of transformers, a Hub id or a folder, whose image tower is the recipe's backbone.
Several --prompt are averaged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rescom_timm.cli import answer, new_parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Write the features; returns the exit code."""
    parser = new_parser(
        __doc__,
        prog,
        "rescom-timm class-features places.txt --model openai/clip-vit-base-patch16 -o places_clip.safetensors",
    )
    parser.add_argument("classes", help="an index, a recipe, or a text file of one name a line")
    parser.add_argument("--model", required=True, help="a CLIP or SigLIP of transformers")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="with {} for the class; 'a photo of a {}.'")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="a file of safetensors")
    options = parser.parse_args(argv)

    def work() -> int:
        from rescom_timm.models.text_features import PROMPT, save_class_features, text_features

        names, prompts = read_class_names(options.classes), options.prompt or [PROMPT]
        features = text_features(names, options.model, prompts)
        save_class_features(options.output, features, names, options.model, prompts)
        shown = ", ".join(prompts[0].replace("{}", name.replace("_", " ")) for name in names[:2])
        print(f"{options.output}: {len(names):,} classes of {features.shape[1]} features ({shown} ...)")
        return 0

    return answer(work, writes=[options.output])


def read_class_names(source: str) -> list[str]:
    """The K class names of an index, a recipe or a text file, in order. Raises InputError (net.class_names)."""
    from rescom_timm.config.loading import load as load_recipe
    from rescom_timm.data.index import Index
    from rescom_timm.data.sources import load
    from rescom_timm.errors import InputError
    from rescom_timm.io import read_text

    path = Path(source).expanduser()
    if not path.is_file() or path.suffix in (".yaml", ".yml"):
        names: list[str] | None = load(load_recipe(source).data).class_names
    elif (text := read_text(path)).startswith("# rescom_timm index"):
        names = Index.load(path, allow_empty=True).class_names
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise InputError("net.class_names", f"{source} has no class names")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError("net.class_names", f"{source} has class names twice: {', '.join(twice[:5])}")
    return names
