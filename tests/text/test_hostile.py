"""Hostile names through everything that holds markup: the model card, the report, the doctor's page, the demo's
answers, a sweep's table."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from rescom_timm.analysis import report
from rescom_timm.analysis.doctor_page import page
from rescom_timm.analysis.run_files import RunFolder
from rescom_timm.cli.parts.sweep import markdown as sweep_table
from rescom_timm.cli.parts.sweep import summary
from rescom_timm.data.decoding import ReadConfig
from rescom_timm.data.doctor import Finding
from rescom_timm.hub import card
from rescom_timm.inference.demo import PRIORS, answers
from rescom_timm.inference.export import export_run
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.text import escape_controls
from rescom_timm.text.pages import code, code_block, markdown
from tests.analysis import made_up
from tests.engine.made_up_run import add_evaluation, make_run
from tests.text.hostile import ALL, CONTROLS, END, FAKE

markdown_it = pytest.importorskip("markdown_it")
GFM = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])


class Elements(HTMLParser):
    """Start tags with their attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *attrs))

    def handle_comment(self, data):
        self.tags.append(("comment", data))

    def handle_data(self, data):
        self.text += data


def plain(name):
    """What a reader sees of a name."""
    return escape_controls(" ".join(name.split()))


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("card") / "run", steps=(2,))
    add_evaluation(run, "test-last", 61.5)
    export_run(run, run / "model")
    (run / "model" / "environment.json").write_text((run / "environment.json").read_text())
    return card.read_facts(run, run / "model", "me/tiny", "mit")


def spoilt(facts, name):
    """The facts with a name wherever others write one."""
    recipe = json.loads(json.dumps(facts.recipe))
    recipe["data"]["source"] = name
    record = {**facts.evaluations["test-last"], "split": name, "checkpoint": name, "chosen": name}
    environment = json.loads(json.dumps(facts.environment))
    environment["data"]["train"]["name"] = environment["command"] = name
    environment |= {"gpus": [name], "packages": {name: name}, "git": {"commit": name, "changed": "x"}}
    details = {**facts.details, "class_names": [name, "dog", name, "fox"], "checkpoint": name}
    return replace(
        facts, repo=f"owner/{name.replace('/', ':')}", recipe=recipe, environment=environment, details=details,
        evaluations={"test-last": record}, license=name, figures=[name.replace("/", "") + ".png"], plain_reason="",
    )  # fmt: skip


@pytest.mark.parametrize("name", ALL, ids=ascii)
def test_a_name_adds_nothing_to_a_card_and_it_can_be_updated(facts, name):
    text = card.write(spoilt(facts, name))
    assert not any(one in text for one in CONTROLS)
    ordinary = card.write(spoilt(facts, "cat"))

    def shape(text):
        """Elements of the card, without what addresses and alternative text say."""
        body = text.split("\n---\n", 1)[1]
        return [(tag, *sorted(key for key, _ in attrs)) if tag != "comment" else (tag, attrs[0].split()[:1])
                for tag, *attrs in Elements(GFM.render(body)).tags]  # fmt: skip

    assert shape(text) == shape(ordinary)
    shown = " ".join(Elements(GFM.render(text.split("\n---\n", 1)[1])).text.split())
    assert f"By class: {' '.join(plain(name).split())} 120, dog 40," in shown
    tags = [tag for tag in Elements(GFM.render(text.split("\n---\n", 1)[1])).tags if tag[0] != "comment"]
    links = [value for _, *attributes in tags for key, value in attributes if key in ("href", "src")]
    assert all(link.startswith(("https://arxiv.org/", "figures/")) for link in links)
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "timm"
    later = replace(facts, license="apache-2.0", figures=["curves.png"])
    bodies = (one.split("\n---\n", 1)[1] for one in (card.write(later, text), card.write(later)))
    assert len({body.partition("<!-- rescom_timm:")[2] for body in bodies}) == 1, "all of it is updated"


@pytest.mark.parametrize("name", [END, f"{FAKE}\nmine\n<!-- /rescom_timm:limits -->", f"x{END}y{END}z"], ids=ascii)
def test_a_card_of_0_2_0_that_a_name_broke_is_updated(facts, name):
    """0.2.0 wrote names as they are: the hash finds the end of a section."""
    text = card.write(facts)
    start = text.index("<!-- rescom_timm:data ")
    old = text[text.index("\n", start) + 1 : text.index(f"\n{END}", start)]
    broken = old.replace("cat 120", f"{name} 120")
    block = f"<!-- rescom_timm:data {card._hash(broken)} -->\n{broken}"
    hurt = text[:start] + block + text[start:][text[start:].index(f"\n{END}") :]
    assert hurt.count(END) > 1 or name.startswith(FAKE)
    assert card.write(facts, hurt) == text


def test_a_section_with_a_forged_end_that_a_person_edited_stays(facts):
    text = card.write(facts)
    edited = text.replace("cat 120", f"{END} 120")
    assert f"{END} 120" in card.write(replace(facts, license="apache-2.0"), edited)


@pytest.mark.parametrize("name", ALL, ids=ascii)
def test_markdown_shows_a_name_as_it_is(name):
    for line in (f"x {markdown(name)} y", f"| x {markdown(name)} y |\n|---|\n| x {markdown(name)} y |"):
        page = Elements(GFM.render(line))
        assert {tag for tag, *_ in page.tags} <= {"p", "table", "thead", "tbody", "tr", "th", "td"}
        assert f"x {plain(name)} y" in " ".join(page.text.split())
    assert [tag for tag, *_ in Elements(GFM.render(f"x {code(name)} y")).tags] == ["p", "code"]
    block = Elements(GFM.render(f"{code_block(name, 'yaml')}\n\nafter"))
    assert [tag for tag, *_ in block.tags] == ["pre", "code", "p"]


def test_ordinary_names_stay_as_they_are_in_markdown():
    for name in ("golden_retriever", "St. Bernard (dog)", "caf\u00e9-au-lait", "digits_lt beta=0.9", "n01440764"):
        assert markdown(name) == name


@pytest.mark.parametrize("name", ALL, ids=ascii)
def test_a_name_adds_nothing_to_a_report(name, tmp_path):
    def made(name, folder):
        run = made_up.make_run(tmp_path / folder, [200, 50, 5], [name, "dog", "fox"])
        (run / "recipe.yaml").write_text(json.dumps({"method": {"name": name}, "name": name}), encoding="utf-8")
        (run / "environment.json").write_text(json.dumps({"command": name}))
        return report.page([RunFolder(run, name)], drawn=[])

    text, ordinary = made(name, "a"), made("a cat", "b")
    page, before = Elements(text), Elements(ordinary)
    assert [tag[0] for tag in page.tags] == [tag[0] for tag in before.tags]
    assert escape_controls(name, lines=True) in page.text and not any(one in text for one in CONTROLS)


class Images:
    """What the page needs of data.doctor.Examined: two images of one name."""

    splits: ClassVar = {"train": None}
    split, label, reading = np.array(["train"] * 2), np.array([0, 1]), ReadConfig()

    def __init__(self, name):
        self.name = [name, name]

    def __len__(self):
        return 2

    def stored(self, i):
        return Image.new("RGB", (8, 8))


@pytest.mark.parametrize("name", ALL, ids=ascii)
def test_a_name_adds_nothing_to_the_page_of_the_doctor(name):
    def made(name):
        found = [Finding("one", "One", "look", [[0, 1]], (f"{name}: odd",))]
        return page(Images(name), found, [name, name], name)

    text, ordinary = made(name), made("a cat")
    shown = Elements(text)
    assert [tag[0] for tag in shown.tags] == [tag[0] for tag in Elements(ordinary).tags]
    assert escape_controls(name, lines=True) in shown.text and not any(one in text for one in CONTROLS)


@pytest.mark.parametrize("name", ALL, ids=ascii)
def test_a_name_adds_nothing_to_the_answers_of_the_demo(name, facts, model, tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)

    def made(name):
        named = replace(model, class_names=[name, "dog", f"{name} 2", "fox"])
        return answers(named, [str(path)], next(iter(PRIORS)), [], 4)

    page = Elements(made(name))
    assert [tag[0] for tag in page.tags] == [tag[0] for tag in Elements(made("cat")).tags]
    assert escape_controls(name, lines=True) in page.text
    wrong = Elements(answers(model, [str(path)], list(PRIORS)[-1], [[name, "x"]] * 4, 4))
    assert [tag[0] for tag in wrong.tags] == ["p", "b"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return from_pretrained(make_run(tmp_path_factory.mktemp("model") / "run", steps=(2,)))


@pytest.mark.parametrize("name", ALL, ids=ascii)
def test_a_name_adds_no_column_to_the_table_of_a_sweep(name):
    table = summary({(name,): [{"top1": 1.0}]})
    rows = Elements(GFM.render(sweep_table(table))).tags
    assert [tag for tag, *_ in rows].count("td") == 3
