"""Our lower bounds are no lower than those of the packages that we stand on, with which they would never be met."""

from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
OWN = [Requirement(text) for text in PROJECT["dependencies"]]
OWN += [Requirement(text) for texts in PROJECT["optional-dependencies"].values() for text in texts]
KNOWN = {"safetensors": "0.6.2", "onnxscript": "0.6", "pyarrow": "24"}
"""Below these something that we call is missing (tried by installing them)."""


def least(one: Requirement) -> Version:
    return max((Version(part.version) for part in one.specifier if part.operator == ">="), default=Version("0"))


# Each torchvision asks for the torch of its own month: the installer finds the pair.
@pytest.mark.parametrize("own", [one for one in OWN if one.name != "torch"], ids=lambda one: one.name)
def test_a_bound_is_met_by_what_the_others_ask_for(own):
    asked = {"us": Version(KNOWN.get(own.name, "0"))}
    for other in OWN:
        try:
            texts = requires(other.name) or []
        except PackageNotFoundError:
            continue
        for need in map(Requirement, texts):
            if need.name == own.name and (need.marker is None or need.marker.evaluate({"extra": ""})):
                asked[other.name] = least(need)
    highest = max(asked, key=lambda name: asked[name])
    if own.specifier:
        assert least(own) >= asked[highest], f"{own}: {highest} asks for {asked[highest]}"
