import json
import shutil
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from rescom_timm.engine.collapse import last_state
from rescom_timm.engine.run_folder import lines
from rescom_timm.hub import card
from rescom_timm.inference.export import export_run
from tests.engine.made_up_run import add_evaluation, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("card") / "run")
    export_run(folder, folder / "model")
    (folder / "model" / "environment.json").write_text((folder / "environment.json").read_text())
    return folder


@pytest.fixture
def facts(run):
    return card.read_facts(run, run / "model", "me/rescom-tiny", "apache-2.0")


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_says_what_a_reader_needs(run, facts):
    text = card.write(facts)
    for told in (
        "# rescom-tiny", "4 classes", "resnet20_cifar", "arXiv 2203.11506", "digits train", "import rescom_timm",
        'timm.create_model("hf-hub:me/rescom-tiny", pretrained=True)', 'from_pretrained("me/rescom-tiny")',
        "172", "120 to 3", "cat 120, dog 40, emu 9, fox 3", "many (more than 100 images): 1 class;", "abababababab",
        "Intended use and limits", "2 classes had fewer than 20", "per_class: 2", "accelerate launch tools/train.py",
        "took 7 seconds on a CPU (1 process)", "Licence: apache-2.0",
    ):  # fmt: skip
        assert told in text, told
    assert "| digits test" not in text.split("## Results")[0].split("## Use")[0]
    assert header(text)["license"] == "apache-2.0" and header(text)["library_name"] == "timm"
    assert ModelCard(text).data.to_dict()["pipeline_tag"] == "image-classification"


def test_the_results_are_those_of_the_run(tmp_path, facts):
    run = make_run(tmp_path / "run")
    add_evaluation(run, "test-last", 61.5)
    add_evaluation(run, "test-best", 63.25)
    add_evaluation(run, "validation-last", 99.0)
    export_run(run, run / "model")
    facts = card.read_facts(run, run / "model", "me/rescom-tiny")
    text = card.write(facts)
    assert "| digits test | best: epoch 4, not selected | 500 | 63.25 | 90.00 | 60.00 | 21.50 | 63.25 | 4.25 |" in text
    told = (
        "many, medium and few: accuracy over the test images of classes with more than 100, 20 to 100 and fewer than 20"
    )
    assert told in text
    path = run / "evaluation" / "test-best.json"
    doubt = {"intervals": {"few": [11.2, 36.0]}, "sizes": {"few": {"images": 38, "classes": 2}}}
    path.write_text(json.dumps(json.loads(path.read_text()) | doubt))
    told = "500 | 63.25 | 90.00 | 60.00 | 21.50 (11-36; n 38) | 63.25 | 4.25 |"
    assert told in card.write(card.read_facts(run, run / "model", "me/rescom-tiny"))
    results = {result.metric_name: result for result in ModelCard(text).data.eval_results}
    assert results["top-1 (best)"].metric_value == 63.25 and results["top-1 (last)"].metric_value == 61.5
    assert all(result.metric_value != 99.0 for result in results.values()), "validation is no result"
    assert {(result.dataset_type, result.dataset_split) for result in results.values()} == {("custom", "test")}
    assert facts.accuracy() == 63.25
    assert "license" not in header(text) and "No licence was named" in text


def test_averaged_weights_are_told_with_their_own_figures(tmp_path, facts):
    run = make_run(tmp_path / "run")
    add_evaluation(run, "test-last", 61.5)
    add_evaluation(run, "test-last-ema", 64.0)
    export_run(run, run / "model")
    facts = card.read_facts(run, run / "model", "me/rescom-tiny")
    assert facts.accuracy() == 61.5 and "moving average" not in card.write(facts)
    averaged = replace(facts, details={**facts.details, "weights": "ema"})
    assert averaged.accuracy() == 64.0 and "Its weights are the moving average of those" in card.write(averaged)


def test_groups_have_the_literatures_borders(facts):
    details = {**facts.details, "counts": [101, 100, 20, 19]}
    text = card.write(card.Facts(**{**vars(facts), "details": details}))
    assert "many (more than 100 images): 1 class; medium (20 to 100 images): 2 classes;" in text
    assert "; few (fewer than 20 images): 1 class." in text


@pytest.mark.parametrize(
    ("there", "shown"),
    [
        (["confusion-a", "curves", "longtail-a", "tsne", "views"], ["longtail-a", "confusion-a", "curves"]),
        (["a", "b", "c", "d"], ["a", "b", "c"]),
        (["tsne", "curves"], ["curves"]),
    ],
)
def test_a_card_shows_few_pictures(run, tmp_path, there, shown):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "figures", ignore_errors=True)
    (folder / "figures").mkdir()
    for name in there:
        (folder / f"figures/{name}.png").write_bytes(b"")
    facts = card.read_facts(folder, folder / "model", "me/x", None, "")
    assert facts.figures == [f"{name}.png" for name in shown]


def test_before_the_end_the_log_is_told(facts):
    assert "during training: epoch 4" in card.write(facts) and "| 40.00 |" in card.write(facts)


def test_a_data_set_of_the_hub_is_linked_and_a_folder_is_not(run, facts, tmp_path, monkeypatch):
    record = {**facts.recipe, "data": {**facts.recipe["data"], "source": "uoft-cs/cifar10"}}
    record["net"] = {**record["net"], "backbone": "resnet50.a1_in1k", "pretrained": True}
    text = card.write(card.Facts(**{**vars(facts), "recipe": record}))
    assert header(text)["datasets"] == ["uoft-cs/cifar10"] and header(text)["base_model"] == "timm/resnet50.a1_in1k"
    assert "import rescom_timm\nfor" in text and "Unknown model" not in text
    (tmp_path / "uoft-cs" / "cifar10").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "datasets" not in header(card.write(card.Facts(**{**vars(facts), "recipe": record})))


def test_writing_twice_changes_nothing(facts):
    text = card.write(facts)
    assert card.write(facts, text) == text


def test_text_outside_our_sections_is_kept(facts):
    text = card.write(facts)
    mine = text.replace("# rescom-tiny\n", "# Birds\n\nTaken in *my garden*.\n", 1) + "\n## Thanks\n\nTo all.\n"
    newer = card.Facts(**{**vars(facts), "license": "mit"})
    after = card.write(newer, mine)
    assert "Taken in *my garden*." in after and after.endswith("\n## Thanks\n\nTo all.\n")
    assert "# rescom-tiny" not in after and "Licence: mit" in after and "Licence: apache-2.0" not in after


def test_a_section_that_a_person_edited_or_removed_stays_so(facts):
    text = card.write(facts)
    edited = text.replace("Intended use and limits", "What it is for")
    start, end = (edited.index(f"<!-- {mark}rescom_timm:training") for mark in ("", "/"))
    edited = edited[:start] + edited[edited.index("-->", end) + 3 :]
    newer = card.Facts(**{**vars(facts), "license": "mit"})
    after = card.write(newer, edited)
    assert "What it is for" in after and "Intended use and limits" not in after
    assert "## Training" not in after and "Licence: mit" in after


def test_the_header_keeps_what_others_wrote(facts):
    before = (
        "---\nlanguage: en\nlicense: gpl-3.0\ntags:\n- birds\nmodel-index:\n- name: other\n  results: []\n"
        "- name: rescom-tiny\n  results: []\n---\n# Hello\n"
    )
    after = header(card.write(card.Facts(**{**vars(facts), "license": None}), before))
    assert after["language"] == "en" and after["license"] == "gpl-3.0" and "birds" in after["tags"]
    assert "timm" in after["tags"] and [entry["name"] for entry in after["model-index"]] == ["rescom-tiny", "other"]
    assert header(card.write(facts, before))["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("before", "body"),
    [
        ("", "# rescom-tiny\n"),
        ("# Only text\n", "# Only text\n"),
        ("---\n- a list\n---\ntext\n", "text\n"),
        ("---\nbad: [\n---\ntext\n", "text\n"),
    ],
)
def test_any_card_can_be_there_before(facts, before, body):
    text = card.write(facts, before)
    assert header(text)["library_name"] == "timm" and "## Use" in text
    assert text.split("---\n", 2)[2].startswith(body)


def test_what_plain_timm_cannot_read_is_said(facts):
    text = card.write(card.Facts(**{**vars(facts), "plain_reason": "two experts"}))
    assert "Plain timm cannot read this model (two experts)" in text
    assert "timm.create_model" not in text and "a plain timm model" not in text


def test_a_model_of_plain_cross_entropy_warns_of_its_prior(tmp_path):
    run = make_run(tmp_path / "run", steps=(2,), method={"name": "cross_entropy"})
    export_run(run, run / "model")
    text = card.write(card.read_facts(run, run / "model", "me/x"))
    assert "lean to the classes that were frequent" in text and "the method `cross_entropy`" in text
    assert json.loads((run / "model" / "rescom.json").read_text())["counts"]


@pytest.mark.parametrize(("share", "dead"), [(0.999, True), (0.8, False)])
def test_a_card_says_whether_the_contrastive_branch_learned(facts, tmp_path, share, dead):
    line = {
        "epoch": 9,
        "train/loss_contrast": 5 * share,
        "train/loss_contrast_chance": 5.0,
        "queue/cosine_between": 0.4,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    text = card.write(replace(facts, contrast=last_state(lines(tmp_path / "metrics.jsonl"))))
    assert f"ended at {100 * share:.0f}% of its chance level" in text and "mean cosine of 0.40" in text
    assert ("contrastive branch learned nothing" in text) == dead
