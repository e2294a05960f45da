"""Bad input and faults of every kind, each a line of the table: what is told, how it ends, what stays whole."""

import fnmatch
import hashlib
import shlex
import warnings
from pathlib import Path

import pytest

from rescom_timm.__main__ import main
from tests.faults import data_lists, models, recipe_values, runs, trained

TABLE = [*recipe_values.FAULTS, *data_lists.FAULTS, *runs.FAULTS, *models.FAULTS]


def test_the_table_is_broad_and_no_kind_stands_in_it_twice():
    kinds = [fault.kind for fault in TABLE]
    assert len(set(kinds)) == len(kinds) >= 200


@pytest.fixture(scope="module", autouse=True)
def last():
    yield
    trained.remove()


def files(place: Path) -> dict[str, str]:
    """The digest of every file below a folder."""
    found = [path for path in place.rglob("*") if path.is_file()]
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def holds(line: str, said: str) -> bool:
    """Whether the parts of `said` that ... joins stand in the line, in their order."""
    for part in filter(None, said.split("...")):
        _, found, line = line.partition(part)
        if not found:
            return False
    return True


@pytest.mark.parametrize("fault", TABLE, ids=lambda fault: fault.kind.replace(" ", "-"))
def test_a_fault_is_told_in_a_line_and_harms_nothing(fault, alone, tmp_path, capsys):
    alone.chdir(tmp_path)
    for make in fault.made:
        make(tmp_path)
    before = files(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            code = main(shlex.split(fault.given))
        except SystemExit as stop:  # argparse's
            code = stop.code
    output, after = capsys.readouterr(), files(tmp_path)
    told = [line for line in output.err.splitlines() if line.strip()]
    lines = [*told, *output.out.splitlines(), *(" ".join(str(one.message).split()) for one in caught)]
    assert any(holds(line, fault.said) for line in lines), "\n".join(lines)
    assert code == fault.code, "\n".join(lines)
    assert not any("Traceback" in line for line in lines)
    assert len(told) <= fault.lines or told[0].startswith("usage: "), output.err
    kept = {name: digest for name, digest in before.items() if fnmatch.fnmatch(name, fault.whole)}
    assert (kept and kept.items() <= after.items()) or not before, "what was there is whole"
    new = [name for name in after.keys() - before.keys() if not fnmatch.fnmatch(name, fault.new)]
    assert not new, "nothing else is written"
