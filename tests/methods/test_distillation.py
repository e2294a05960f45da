"""DiVE, SSD and experts that learn from a teacher: against loops, and in runs that are resumed and exported."""

import pytest
import timm
import torch

from rescom_timm import losses
from rescom_timm.api import train_recipe as train
from rescom_timm.config.loading import load
from rescom_timm.config.recipe import RecipeError
from rescom_timm.engine import checkpoint
from rescom_timm.engine.evaluate import evaluate_run
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.methods import METHODS, DiveConfig, ExpertsConfig, SsdConfig, create_method
from rescom_timm.methods.distillation import Teacher
from rescom_timm.models.net import ProjectorConfig, create_model
from tests.marks import slow
from tests.methods import reference
from tests.methods.stub import COUNTS, batch, make, make_net
from tests.methods.stub import train as few_steps
from tests.methods.test_training import QUICK, weights
from tests.raises import raises
from tests.recipes import load_recipe


def run(name, output, *words):
    return train(load_recipe(name, [f"output={output}", *QUICK, *words]))


def taught(config):
    method = make(config)
    method.teacher = Teacher(make_net(seed=5))
    return method


def check(method, expected, outputs):
    assert torch.allclose(outputs["loss"], expected, rtol=1e-9)
    weights = [p for p in method.net.parameters() if p.requires_grad]
    mine, theirs = (torch.autograd.grad(loss, weights) for loss in (outputs["loss"], expected))
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-12) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(("tau", "power"), [(3.0, 0.5), (2.0, 1.0), (0.7, 1.5)])
def test_distillation_is_its_equation(tau, power):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (4 * torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_(), teacher.requires_grad_()
    loss = losses.distillation(student, teacher, tau, power)
    expected = reference.distilled(student, teacher.detach(), tau, power)
    assert torch.allclose(loss, expected, rtol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, expected)))
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)
    same = losses.distillation(student, student, tau)
    assert same.abs() < 1e-14


@pytest.mark.parametrize("views", [1, 2])
def test_dive_is_its_equation(views):
    config = DiveConfig(views=views, alpha=0.3, temperature=2.5, power=0.6)
    method, data = taught(config), batch(views=views)
    images, labels = data["image"].transpose(0, 1).flatten(0, 1), data["label"].repeat(views).tolist()
    logits, targets = method.net(images).logits, make_net(seed=5).eval().classify(images).detach()
    expected = 0.7 * reference.adjusted(logits, labels, COUNTS, 1.0)
    expected = expected + 0.3 * reference.distilled(logits, targets, 2.5, 0.6)
    check(method, expected, method(data))


def test_ssd_teaches_one_classifier_by_labels_and_the_other_by_the_teacher():
    method, data = taught(SsdConfig(temperature=1.5)), batch(views=1)
    images = data["image"][:, 0]
    features = method.net(images).features
    head, targets = method.net.classifier, make_net(seed=5).eval().classify(images).detach()
    soft = features @ head.weight.T + head.bias
    hard = features @ head.hard.weight.T + head.hard.bias
    expected = reference.cross_entropy(hard, data["label"].tolist()) + reference.distilled(soft, targets, 1.5, 1.0)
    outputs = method(data)
    check(method, expected, outputs)
    assert torch.equal(outputs["logits"], method.net(images).logits[0])
    method.eval()
    features = method.net.encoder(images)
    assert torch.allclose(method.net.classify(images), features @ head.weight.T + head.bias)


def test_experts_distil_into_their_mean_what_a_teacher_says():
    torch.manual_seed(0)
    nets = [create_model("resnet20_cifar", 4, projector=ProjectorConfig(hidden=4, dim=3)) for _ in range(3)]
    method = create_method(nets[0], COUNTS, ExpertsConfig(experts=2, branch="layer3")).double()
    config = ExpertsConfig(experts=2, branch="layer3", teacher="a run", distill_weight=0.4, distill_temperature=1.7)
    taught = create_method(nets[1], COUNTS, config).double()
    taught.net.load_state_dict(method.net.state_dict())
    taught.teacher = Teacher(nets[2].double())
    images = torch.randint(0, 256, (6, 1, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    data = {"image": images, "label": torch.tensor([0, 1, 2, 3, 0, 1])}
    method.net.eval(), taught.net.eval()  # BatchNorm's batch statistics would move between the passes
    logits, targets = taught.net(images[:, 0]).logits, nets[2].classify(images[:, 0]).detach()
    expected = method(data)["loss"] + 0.4 * reference.distilled(logits, targets, 1.7, 1.0)
    assert torch.allclose(taught(data)["loss"], expected, rtol=1e-9)
    for name in ("teacher", "distill_weight", "distill_temperature"):
        assert hasattr(ExpertsConfig(), name)


def test_a_teacher_stays_as_it_is_and_is_no_part_of_the_method():
    method = taught(DiveConfig())
    before = {name: value.clone() for name, value in method.teacher.net.state_dict().items()}
    few_steps(method)
    assert all(torch.equal(before[name], value) for name, value in method.teacher.net.state_dict().items())
    assert not method.teacher.net.training and not any(p.requires_grad for p in method.teacher.net.parameters())
    assert not any("teacher" in name for name in (*method.state_dict(), *dict(method.named_modules())))
    method.teacher = None
    with raises("method.teacher", "method.teacher"):
        method(batch(views=1))


@pytest.mark.parametrize(
    ("config", "settings", "setting"),
    [
        (DiveConfig, {"alpha": 1.1}, "alpha"),
        (DiveConfig, {"temperature": 0.0}, "temperature"),
        (DiveConfig, {"power": 0.0}, "power"),
        (SsdConfig, {"temperature": -1.0}, "temperature"),
        (ExpertsConfig, {"distill_weight": -1.0}, "distill_weight"),
        (ExpertsConfig, {"distill_temperature": 0.0}, "temperature"),
    ],
)
def test_impossible_settings_are_refused(config, settings, setting):
    with raises("method.value", setting):
        config(**settings)


# ------------------------------------------------------------------------------------------------------------ in runs


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return run("digits_lt +balanced_softmax", tmp_path_factory.mktemp("teachers"))


def resumed_as_whole(name, tmp_path, *words):
    """A run of two epochs; asserts that one resumed in the middle is the same, and that it is evaluated."""
    words = [*words, "train.epochs=2", "checkpoint.keep=9"]
    whole = run(name, tmp_path, *words, "name=whole")
    halved = load_recipe(name, [f"output={tmp_path}", *QUICK, *words, "name=halved"])
    middle = checkpoint.listed(whole / "checkpoints")[0]
    (tmp_path / "halved" / "checkpoints").mkdir(parents=True)
    middle.rename(tmp_path / "halved" / "checkpoints" / middle.name)
    resumed = train(halved, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))
    assert evaluate_run(whole)[2].compute() == evaluate_run(resumed)[2].compute()
    return whole


@pytest.mark.parametrize("name", ["dive", *slow("ssd")])
def test_a_run_is_resumed_and_exported_as_a_plain_timm_model(name, teacher, tmp_path):
    folder = resumed_as_whole(f"digits_lt +{name}", tmp_path, f"method.teacher={teacher}")
    _, saved, state = checkpoint.newest(folder / "checkpoints")
    assert state["method"] == {} and state["teacher"] == Teacher(from_pretrained(teacher).net).digest
    images = torch.rand(3, 3, 8, 8)
    read, plain = from_pretrained(folder), timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    assert torch.allclose(plain(images), read.net.classify(images), atol=1e-5)
    assert all(torch.equal(saved[key], value) for key, value in read.net.state_dict().items())
    with raises("method.teacher"):  # which an export does not hold
        read.method().train()({"image": images[:, None], "label": torch.tensor([0, 1, 2])})


@pytest.mark.slow
def test_ssd_in_its_three_stages(tmp_path):
    first = run("digits_lt +ssd_1", tmp_path, "method.queue_size=32")
    second = run("digits_lt +ssd_2", tmp_path, f"from={first}")
    last = run("digits_lt +ssd", tmp_path, f"method.teacher={second}")
    assert load(last / "recipe.yaml").method.teacher.endswith("digits_lt_ssd_2")


@pytest.mark.slow
def test_experts_learn_from_a_run_of_more_experts(tmp_path):
    words = ["method.experts=2", "method.views=1"]
    teacher = run("digits_lt +experts", tmp_path, "method.experts=3", "method.views=1", "name=teacher")
    folder = run("digits_lt +experts", tmp_path, *words, f"method.teacher={teacher}")
    assert "train/loss_distillation" in (folder / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_another_teacher_is_refused_at_resume_and_a_moved_one_is_not(teacher, tmp_path):
    words = [f"output={tmp_path}", *QUICK]
    run("digits_lt +dive", tmp_path, f"method.teacher={teacher}")
    other = run("digits_lt +balanced_softmax", tmp_path, "seed=1")
    again = load_recipe("digits_lt +dive", [*words, f"method.teacher={other}"])
    with raises("checkpoint.differs", "method.teacher"):
        train(again, resume=True)
    moved = tmp_path / "elsewhere"
    (teacher / "model").rename(moved)
    try:
        train(load_recipe("digits_lt +dive", [*words, f"method.teacher={moved}"]), resume=True)
    finally:
        moved.rename(teacher / "model")


def test_a_teacher_that_does_not_fit_is_refused_before_training(teacher, tmp_path):
    def start(name, *words):
        train(load_recipe(name, [f"output={tmp_path}", *QUICK, *words]), dry_run=True)

    for name in (name for name, (_, method) in METHODS.items() if method.needs_teacher):
        with raises("recipe.missing_key", name, "method.teacher"):
            start(f"digits_lt +{name}")
    with pytest.raises(RecipeError, match=r"method\.teacher: .*nothing"):
        start("digits_lt +dive", f"method.teacher={tmp_path / 'nothing'}")
    (tmp_path / "checkpoints").mkdir()
    with raises("checkpoint.missing", "method.teacher"):
        start("digits_lt +dive", f"method.teacher={tmp_path}")
    eight = from_pretrained(teacher, num_classes=8).net
    with raises("data.classes", "method.teacher", 8, 10):
        refused(eight, [])
    with raises("data.classes", "method.teacher", "'1'", "'0'"):
        refused(from_pretrained(teacher).net, [str(digit) for digit in (1, 0, *range(2, 10))])


def refused(net, names):
    from rescom_timm.data.sources import load as load_data
    from rescom_timm.engine.build import build_method

    recipe = load_recipe("digits_lt +dive", [*QUICK, "method.teacher=x"])
    build_method(recipe, load_data(recipe.data), start=True, teacher=Teacher(net, names))
