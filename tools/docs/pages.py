"""A hook of MkDocs that makes the site's pages from the repository.

Guides are the repository's Markdown files, under the paths that they have there, so that links between them hold.
Each recipe and each public module has a page. Links to other files lead to the page of the recipe or the module.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "rescom_timm"
GUIDES = (*ROOT.glob("*.md"), *ROOT.glob("recipes/*.md"), *ROOT.glob("tools/*.md"), *PACKAGE.rglob("README.md"))
RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))
COPIED = (ROOT / "LICENSE", ROOT / "CITATION.cff", *ROOT.glob("tools/*.png"), *ROOT.glob("tools/*.ipynb"))
PROJECT = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name == "__init__.py" or not path.stem.startswith("_"))


def uri(path: Path) -> str:
    """The path in the repository, as MkDocs writes paths."""
    return path.relative_to(ROOT).as_posix()


def page_of(path: Path) -> str:
    """The page that shows a module or a recipe: "api/rescom_timm/data.md" for rescom_timm/data/__init__.py."""
    if path.suffix == ".yaml":
        return uri(path.with_suffix(".md"))
    return f"api/{dotted(path).replace('.', '/')}.md"


def dotted(path: Path) -> str:
    """The module's name: "rescom_timm.data.transforms"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def api(package: Path) -> list[Any]:
    """The navigation of a package: its own page, its packages, its modules."""
    own = package / "__init__.py"
    packages = [{path.parent.name: api(path.parent)} for path in sorted(package.glob("*/__init__.py"))]
    modules = [{path.stem: page_of(path)} for path in MODULES if path.parent == package and path != own]
    return [{"overview": page_of(own)}, *packages, *modules]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write the navigation from what is in the repository."""
    guides = sorted(uri(path) for path in GUIDES if path.is_relative_to(PACKAGE))
    config.nav = [
        {"Home": "README.md"},
        {"Guides": [*guides, "tools/README.md"]},
        {"Recipes": "recipes/README.md"},
        {"Results": "RESULTS.md"},
        {"API": api(PACKAGE)},
        {"Project": [page for page in PROJECT if (ROOT / page).is_file()]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add guides and pictures as they are, and a page for each recipe and module."""
    for path in (*GUIDES, *COPIED):
        files.append(File.generated(config, uri(path), abs_src_path=str(path)))
    for path in RECIPES:
        content = f"# {path.stem}\n\n```yaml\n{path.read_text(encoding='utf-8')}```\n"
        files.append(File.generated(config, page_of(path), content=content))
    for path in MODULES:
        files.append(File.generated(config, page_of(path), content=f"::: {dotted(path)}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to recipes and modules to their pages."""
    folder = posixpath.dirname(page.file.src_uri)

    def to_page(link: re.Match[str]) -> str:
        target = ROOT / posixpath.normpath(posixpath.join(folder, link[1]))
        if target.suffix in (".py", ".yaml") and target.is_file():
            return f"]({posixpath.relpath(page_of(target), folder)})"
        return link[0]

    return re.sub(r"\]\(((?!\w+:)[^)#\s]+)\)", to_page, markdown)
