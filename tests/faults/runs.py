"""Checkpoints and run folders that are damaged, moved, someone else's, or of another kind than they say."""

import os
import pickle

from tests.faults.fault import Change, Fault, changed, data, empty, flipped, folder, gone, half, hashed, photos, text
from tests.faults.trained import a_run, longer, nan, tensors, whole_numbers

LAST, FIRST = "run/checkpoints/step-00000022", "run/checkpoints/step-00000011"
ALL = "run/*"


def resumed(kind: str, said: str, *made: Change, words: str = "", **more: object) -> Fault:
    """The run, changed so, gone on with."""
    given = f"train run/recipe.yaml --resume {words}"
    return Fault(kind, given, said, made=(a_run, *made), **more)  # type: ignore[arg-type]


def again(kind: str, said: str, *made: Change) -> Fault:
    """The last checkpoint, changed so, is passed over; the one before it is gone on with."""
    return resumed(kind, said, *made, code=0, whole=f"{FIRST}/*", new=ALL)


def evaluated(kind: str, words: str, said: str, *made: Change, **more: object) -> Fault:
    return Fault(kind, f"evaluate {words}", said, made=(a_run, *made), **more)  # type: ignore[arg-type]


def drawn(kind: str, words: str, said: str, *made: Change, **more: object) -> Fault:
    return Fault(kind, f"plot {words}", said, made=(a_run, *made), **more)  # type: ignore[arg-type]


def both(damage: object) -> tuple[Change, ...]:
    return tuple(damage(f"{path}/state.json") for path in (FIRST, LAST))  # type: ignore[operator]


# fmt: off
RESUMED = [
    again("weights cut off", "step-00000022...net.safetensors", half(f"{LAST}/net.safetensors")),
    again("checkpoint without its hashes", "step-00000022...hashes.json",
          gone(f"{LAST}/hashes.json")),
    again("pickle for a state", "step-00000022...state.json",
          data(f"{LAST}/state.json", pickle.dumps(os.getcwd)), hashed(LAST)),
    again("state nested without end", "step-00000022...state.json",
          text(f"{LAST}/state.json", "[" * 99999), hashed(LAST)),
    again("line of figures torn", "metrics.jsonl...line 2",
          lambda place: (place / "run/metrics.jsonl").write_text(
              '{"epoch": 1, "step": 11}\n{"epoch"\n{"epoch": 2, "step": 22}\n')),
    again("recipe of a run emptied", "recipe...step-00000022", empty("run/recipe.yaml")),
    again("recipe of a run torn", "recipe...step-00000022", text("run/recipe.yaml", "name: [")),
    resumed("every checkpoint damaged", "[checkpoint.damaged]...run/checkpoints", *both(half)),
    resumed("every recipe damaged", "[checkpoint.damaged]...run/checkpoints", *both(flipped),
            empty("run/recipe.yaml")),
    resumed("weights that are no numbers", "[checkpoint.differs]...step-00000022...classifier.bias",
            tensors(f"{LAST}/net.safetensors", nan), hashed(LAST)),
    resumed("weights that are whole numbers", "[checkpoint.differs]...step-00000022...int64",
            tensors(f"{LAST}/net.safetensors", whole_numbers), hashed(LAST)),
    resumed("weights of another size", "[checkpoint.differs]...step-00000022...classifier.bias",
            tensors(f"{LAST}/net.safetensors", longer), hashed(LAST)),
    resumed("other learning rate than before", "different: optimizer.lr (0.1 then, 0.3 now)", words="optimizer.lr=0.3"),
    resumed("other method than before", "[checkpoint.differs]...method.name ('rescom'",
            words="method.name=cross_entropy"),
    resumed("other rows than before", "[checkpoint.differs]...data.index ('exponential(20)'", words="data.index=all"),
    resumed("other classes than before", "[checkpoint.differs]...net.backbone", words="net.backbone=resnet8_cifar"),
    resumed("checkpoints' folder that is a file", "[checkpoint.missing]...run...--resume",
            gone("run/checkpoints"),
            text("run/checkpoints", "mine")),
    resumed("checkpoints that are gone", "[checkpoint.missing]...run...--resume", gone(FIRST), gone(LAST)),
    resumed("log that is a folder", "metrics.jsonl", folder("run/metrics.jsonl"), whole=f"{LAST}/*", new=ALL),
    resumed("lock that is a folder", "[file.kind]...run/.lock", folder("run/.lock")),
    resumed("evaluation that is a file", "[file.kind]...run/evaluation",
            gone("run/evaluation"), text("run/evaluation", "mine"),
            whole=f"{LAST}/*", new=ALL),
    resumed("model that is a file", "[run.export]...run/model", gone("run/model"),
            text("run/model", "mine"), whole="run/model", new=ALL),
    Fault("folder of a run for its recipe", "train run", "it is a folder: write run/recipe.yaml, with --resume",
          made=(a_run,)),
    Fault("run that is not there", "train none/recipe.yaml --resume", "[recipe.missing]...none/recipe.yaml"),
    Fault("output that is a file", "train digits_lt output=f --dry-run", "[run.output]...output...f",
          made=(text("f", "mine"),)),
    Fault("output below a file", "train digits_lt output=f/x", "[run.output]...output...f/x", made=(text("f",
            "mine"),)),
    Fault("start from a file that is no weights", "train digits_lt from=f --dry-run",
          "[train.from]...f", made=(text("f", "junk" * 99),)),
    Fault("start from a folder of nothing", "train digits_lt from=f --dry-run",
            "[checkpoint.damaged]...f/hashes.json", made=(folder("f"),)),
    Fault("start from another net", "train digits_lt from=run --dry-run",
          "[train.from]...step-00000022...encoder.", made=(a_run,)),
    Fault("start from a run all damaged", "train digits_lt from=run --dry-run",
            "[checkpoint.damaged]...run/checkpoints",
          made=(a_run, *both(half))),
]

EVALUATED = [
    evaluated("evaluation of nothing", "none", "[run.missing]...none"),
    evaluated("evaluation of a folder of images", "p", "[run.missing]...p ...recipe.yaml", photos()),
    evaluated("evaluation of a file", "f", "[run.missing]...f ", text("f", "mine")),
    evaluated("checkpoint that there is not", "run --checkpoint step-7",
              "no checkpoint step-7; there are: last, best, step-"),
    evaluated("folder that holds runs", ".", "[run.missing]...run?"),
    evaluated("run without its folder", "one", "no run folder one: did you mean runs/one?", folder("runs/one")),
    evaluated("checkpoint that is damaged", f"run --checkpoint {FIRST}", "[checkpoint.damaged]...step-00000011",
              flipped(f"{FIRST}/state.safetensors")),
    evaluated("run without a checkpoint", "run", "run/checkpoints",
              gone(FIRST), gone(LAST)),
    evaluated("average that there is not", "run --weights ema", "[checkpoint.average]...train.ema"),
    evaluated("evaluation by another net", "run net.backbone=resnet8_cifar", "error[...step-00000022"),
    evaluated("evaluation of data that is not there", "run data.source=./none", "error[...none"),
    evaluated("validation that the recipe lacks", "run --split validation data.validation=none",
              "[data.split]...run...data.validation"),
    evaluated("five crops of no crop", "run --five-crops views.eval=none", "[recipe.conflict]...views.eval", new=ALL),
    evaluated("word that is no key", "run net.backbon=resnet18", "[recipe.unknown_key]...net.backbon;...net.backbone"),
    evaluated("weights evaluated that are no numbers", "run", "error[...classifier.bias",
            tensors(f"{LAST}/net.safetensors", nan),
              hashed(LAST)),
    evaluated("figures' folder that is a file", "run", "run/figures", text("run/figures", "mine"), whole="run/figures",
              new=ALL),
]

DRAWN = [
    drawn("figures of nothing", "none", "[run.missing]...none"),
    drawn("figures of a folder of images", "p", "[run.missing]...p ...recipe.yaml", photos()),
    drawn("figure that there is not", "run --only confusio", "confusion"),
    drawn("figure of an evaluation that there is not", "run --only confusion --evaluation test-best9",
          "has no evaluation test-best9", code=0),
    drawn("predictions torn", "run --only confusion", "rescom-timm evaluate",
          half("run/evaluation/test-last.safetensors"), code=0),
    drawn("record that is a list", "run --only confusion", "test-last.json...list",
            text("run/evaluation/test-last.json",
          "[]")),
    drawn("record that counts other classes", "run --only confusion", "test-last.json...numbers of classes",
          changed("run/evaluation/test-last.json", per_class__count=[1, 2])),
    drawn("log without a line", "run --only curves", "metrics.jsonl...run",
          empty("run/metrics.jsonl"), code=0),
    drawn("recipe torn under figures", "run --only report", "recipe.yaml", text("run/recipe.yaml", "a: [")),
    drawn("net that cannot be drawn from", "run --only tsne", "every checkpoint in run/checkpoints is damaged",
          *both(half), code=0),
    drawn("pictures where a file is", "run --only curves -o f", "[file.exists]...f", text("f", "mine")),
]
# fmt: on

FAULTS = [*RESUMED, *EVALUATED, *DRAWN]
