"""recipes/README.md tells of the recipes that there are."""

from rescom_timm.cli.recipes import table
from rescom_timm.config.loading import SHIPPED, presets, shipped


def test_the_table_is_that_of_the_files():
    text = (SHIPPED / "README.md").read_text()
    assert text.endswith(table() + "\n"), "write it again: its end is what  rescom-timm recipes --table  prints"
    assert all(f"[`{path.stem}`]({path.name})" in text for path in shipped())
    assert all(f"[`+{name}`](methods/{name}.yaml)" in text for name in presets())
    assert len(shipped()) + len(presets()) <= 66
