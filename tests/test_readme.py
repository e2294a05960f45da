"""What README shows is run as it stands."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from rescom_timm.recipe.loading import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", [b for b in blocks("python") if "runs/" not in b], ids=lambda code: code[:30])
def test_python_blocks_run(code):
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    if "loss" in names:
        assert isinstance(names["loss"], torch.Tensor) and names["loss"].isfinite()
    if "embeddings" in names:
        assert [tuple(names[name].shape) for name in ("features", "logits", "embeddings")] == [
            (8, 512),
            (8, 100),
            (8, 128),
        ]


def test_commands_name_tools_recipes_and_keys_that_exist():
    lines = [line for block in blocks("bash") for line in block.splitlines() if "tools/" in line]
    assert len(lines) > 8
    for line in lines:
        words = shlex.split(line, comments=True)
        tool = next(word for word in words if word.startswith("tools/"))
        assert (ROOT / tool).is_file(), tool
        if tool == "tools/train.py":
            words = words[words.index(tool) + 1 :]
            recipe, *rest = [word for word in words if not word.startswith("-")]
            run = re.fullmatch(r"runs/(\w+)/recipe\.yaml", recipe)  # of a run of the recipe of that name
            load(ROOT / (f"recipes/{run[1]}.yaml" if run else recipe), rest)


def test_every_recipe_of_the_table_exists():
    for name in re.findall(r"`((?:digits|cifar|imagenet|places|inat)\w+)`", README):
        assert (ROOT / "recipes" / f"{name}.yaml").is_file(), name
