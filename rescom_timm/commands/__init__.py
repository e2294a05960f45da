"""One verb a file; each is asked for its parser first, and imports what does the work when its words are read, so that
help comes at once."""

from __future__ import annotations

import argparse


def new_parser(about: str | None, prog: str | None, *examples: str) -> argparse.ArgumentParser:
    """A parser that tells ``about`` as it is written, and ends with examples of the verb."""
    return argparse.ArgumentParser(
        prog=prog,
        description=about,
        epilog=example(*examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def example(*lines: str) -> str:
    return "\n".join([f"example{'s' * (len(lines) > 1)}:", *(f"  {line}" for line in lines)])
