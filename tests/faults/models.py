"""Exports that were changed, and what predict, push and the other verbs are given that cannot be."""

import json
import struct

from tests.faults.fault import Change, Fault, changed, data, empty, flipped, folder, gone, half, hashed, photos, text
from tests.faults.trained import a_run, longer, nan, tensors

MODEL, DETAILS = "run/model", "run/model/rescom.json"


def predicted(kind: str, words: str, said: str, *made: Change, **more: object) -> Fault:
    """Labels by the run's model for the pictures of p."""
    return Fault(kind, f"predict {words}", said, made=(a_run, photos(), *made), **more)  # type: ignore[arg-type]


def read(kind: str, said: str, *made: Change, **more: object) -> Fault:
    """The model, changed so by somebody who knows to write its hashes anew, is read."""
    return predicted(kind, f"{MODEL} p", said, *made, hashed(MODEL), **more)


# fmt: off
READ = [
    read("size of images that is none", "[model.details]...input_size in rescom.json...8192", changed(DETAILS,
         input_size=[3, 0, 0])),
    read("size of images without end", "[model.details]...input_size", changed(DETAILS,
         input_size=[3, 10**9, 10**9])),
    read("size of images gone", "[model.unreadable]...'input_size'...rescom.json", changed(DETAILS, input_size=None)),
    read("mean that is no number", "[model.details]...mean in rescom.json must be three finite numbers",
         changed(DETAILS,
         mean=[float("nan")] * 3)),
    read("class too few", "[model.details]...counts", changed(DETAILS, class_names=["a", "b"])),
    read("classes that are a number", "[model.details]...class_names", changed(DETAILS, class_names=3)),
    read("backbone of nowhere", "cannot be read", changed(DETAILS, backbone="nowhere_50")),
    read("option of a stranger", "checkpoint_path", changed(DETAILS, options={"checkpoint_path": "/etc/passwd"})),
    read("projector without end", "[model.details]...rescom.json",
         changed(DETAILS, projector={"hidden": 10**9, "dim": 8})),
    read("policy that is none", "[recipe.views]...resize(", changed(DETAILS, eval_policy="resize(")),
    read("orientation that is a text", "[recipe.value]...exif", changed(DETAILS,
         reading={"exif": "yes"})),
    read("reading that is unknown", "[recipe.value]...gamma", changed(DETAILS, reading={"gamma": 2})),
    read("white level that is none", "[recipe.value]...white_level...65535", changed(DETAILS,
         reading={"white_level": 0})),
    read("policy that is a number", "cannot be read", changed(DETAILS, eval_policy=3)),
    read("details that are a list", "[file.format]...rescom.json", text(DETAILS, "[]")),
    read("details that are no JSON", "[file.format]...rescom.json", text(DETAILS, "{")),
    read("details nested without end", "[file.format]...rescom.json", text(DETAILS, '{"a":' * 9999)),
    read("tensors that are no numbers", "not finite", tensors(f"{MODEL}/rescom.safetensors", nan)),
    read("classifier of no numbers", "not finite", tensors(f"{MODEL}/model.safetensors", nan)),
    read("tensors of another size", "cannot be read", tensors(f"{MODEL}/rescom.safetensors", longer)),
    read("safetensors that are none", "[model.unreadable]...run/model", text(f"{MODEL}/rescom.safetensors", "junk")),
    read("safetensors with a header of 2**60 bytes", "[model.unreadable]...run/model",
         data(f"{MODEL}/rescom.safetensors", struct.pack("<Q", 2**60) + b"{}")),
    read("safetensors that overlap", "[model.unreadable]...run/model", data(f"{MODEL}/rescom.safetensors",
         (lambda head: struct.pack(
         "<Q", len(head)) + head + b"0" * 8)(json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
         for name in "ab"}).encode()))),
    read("recipe of a model that is a list", "the recipe of this model cannot be read and is left out",
         text(f"{MODEL}/recipe.yaml", "- 1\n"), code=0, new="predictions.csv"),
]

PREDICTED = [
    predicted("weights of a model flipped", f"{MODEL} p", "[model.damaged]...model.safetensors",
              flipped(f"{MODEL}/model.safetensors")),
    predicted("hashes of a model gone", f"{MODEL} p", "[model.damaged]...hashes.json",
              gone(f"{MODEL}/hashes.json")),
    predicted("hashes that are a list", f"{MODEL} p", "[model.damaged]...hashes.json",
              text(f"{MODEL}/hashes.json", "[]")),
    predicted("config of a model repaired", f"{MODEL} p", "config.json in run/model was changed",
              text(f"{MODEL}/config.json", "{}"), code=0, new="predictions.csv"),
    predicted("model that is not there", "./none p", "[file.missing]...no run folder ./none here"),
    predicted("model below a folder that is here", "p/none p", "[file.missing]...p/none...hf://p/none"),
    predicted("model that is a folder of images", "./p p", "[model.missing]...rescom.json"),
    predicted("run of damaged checkpoints alone", "run p", "every checkpoint in run/checkpoints is damaged",
          gone(MODEL),
              half("run/checkpoints/step-00000022/net.safetensors"), half("run/checkpoints/step-00000011/state.json")),
    predicted("run without its classes", "run p", "[model.missing]...classes.json...--resume",
         gone(MODEL), gone("run/classes.json")),
    predicted("run with its classes torn", "run p", "[file.format]...classes.json",
         gone(MODEL), empty("run/classes.json")),
    predicted("images that predict does not find", "run q", "[file.missing]...q"),
    predicted("folder without an image", "run q", "[predict.images]...q...png", folder("q")),
    predicted("no image at all", "run", "give images, or --data SOURCE", code=2),
    predicted("list without its images", "run p --list l.csv", "[usage.arguments]...--list needs --data", code=2),
    predicted("labels of 0 classes", "run p --top-k 0", "[predict.value]...top_k...0"),
    predicted("top-k of text", "run p --top-k x", "invalid int value: 'x'", code=2),
    predicted("batch of no image", "run p --batch-size 0", "[predict.value]...batch_size...0"),
    predicted("device that there is not", "run p --device foo", "[predict.value]...foo"),
    predicted("prior that is not there", "run p --prior none.txt", "[file.missing]...none.txt"),
    predicted("prior of an unknown class", "run p --prior q.csv", "[predict.prior]...q.csv: line 2...'cat'",
          text("q.csv", "0,1\ncat,2\n")),
    predicted("prior of a class twice", "run p --prior q.csv", "[predict.prior]...q.csv: line 2...'0'",
          text("q.csv", "0,1\n0,2\n")),
    predicted("prior that lacks classes", "run p --prior q.csv", "q.csv has no number for 2, 3",
          text("q.csv", "class,count\n0,1\n1,2\n")),
    predicted("prior of a class without a number", "run p --prior q.csv", "[predict.prior]...q.csv: line 2",
          text("q.csv", "0,1\n1,many\n")),
    predicted("revision of a folder", "run p --revision main", "[hub.id]...revision"),
    predicted("escape code in a prior", "run p --prior q.csv", "[predict.prior]...'\\x1b]52;c;bWU=\\x07'",
          text("q.csv", "\x1b]52;c;bWU=\x07,1\n")),
    predicted("prior that is text", "run p --prior q.txt", "[predict.prior]...q.txt", text("q.txt", "one two")),
    predicted("prior of two classes", "run p --prior q.txt", "[predict.prior]...10 counts",
              text("q.txt", "1\n2\n")),
    predicted("prior that is no number", "run p --prior q.txt", "[predict.prior]...nan",
              text("q.txt", "nan\n" * 10)),
    predicted("prior of nothing", "run p --prior q.txt", "[predict.prior]...10",
              text("q.txt", "0\n" * 10)),
    predicted("coverage above 1", "run p --coverage 2", "[predict.value]...coverage...2"),
    predicted("coverage that few images cannot give", "run p --coverage 0.9999",
          "[predict.calibration]...0.9999...10000"),
    predicted("coverage by group by a model that is no run", f"{MODEL} p --coverage 0.9 --by-group",
          "[run.missing]...model"),
    predicted("neighbours among a text", "run p --nearest 1 --among q", "[predict.embeddings]...q", text("q",
          "junk")),
    predicted("neighbours among nothing", "run p --among q", "[usage.arguments]...--among...--nearest", code=2),
    predicted("negative neighbours", "run p --nearest -1", "nearest"),
    predicted("labels of other classes", "run --data p", "[data.classes]...p (a, b"),
    predicted("table where a folder is", "run p -o q", "[file.kind]...q", folder("q")),
    predicted("table in a folder that is not there", "run p -o q/labels.csv", "q"),
    predicted("table below a file", "run p -o q/labels.csv", "q", text("q", "mine")),
    predicted("image that is empty", "run p", "1 unreadable", empty("p/a/0.png"), code=0, new="predictions.csv"),
]

PUSHED = [
    Fault("export of nothing", "export none", "]: no run folder none", made=(a_run,)),
    Fault("push to nowhere", "push run", "[hub.id]...hub.repo", made=(a_run,)),
    Fault("push to a name of no owner", "push run --repo digits", "repo must be owner/name, not 'digits'",
          made=(a_run,)),
    Fault("export onto a file", "export run -o f", "[file.exists]...f", made=(a_run, text("f", "mine"))),
    Fault("average exported that there is not", "export run --weights ema", "average", made=(a_run,)),
    Fault("program where a folder is", "export run --format torch -o f", "f", made=(a_run, folder("f"))),
    Fault("key that the hub section lacks", "export run hub.privat=false", "unknown key hub.privat", made=(a_run,)),
]

OTHERS = [
    Fault("recipe to print that there is not", "recipes digits_lr", "[recipe.missing]...digits_l"),
    Fault("doctor of nothing", "doctor none", "[recipe.missing]... none"),
    Fault("report of the doctor where a folder is", "doctor digits_lt -o q", "q", made=(folder("q"),)),
    Fault("features of no class", "class-features n.txt --model m -o o", "[net.class_names]...n.txt",
          made=(text("n.txt", "\n"),)),
    Fault("features of a class twice", "class-features n.txt --model m -o o", "[net.class_names]...n.txt...: a",
          made=(text("n.txt", "a\na\n"),)),
    Fault("names of classes in bytes", "class-features n.txt --model m -o o", "[file.format]...n.txt",
          made=(data("n.txt", b"\xff\xfea"),)),
    Fault("robustness of nothing", "robustness none", "]: no run folder none"),
    Fault("robustness of no image", "robustness run --limit 0", "[usage.arguments]...--limit...0", made=(a_run,)),
    Fault("corruption with a typo", "robustness run --kinds snw", "did you mean snow", made=(a_run,)),
    Fault("corrupted images that are not there", "robustness run --prepared none",
          "no folder none of corrupted images", made=(a_run,)),
    Fault("corrupted images that are none", "robustness run --prepared p", "is neither ImageNet-C", made=(a_run,
          photos())),
    Fault("baseline of other classes", "robustness run --baseline alexnet",
          "[usage.arguments]...--baseline alexnet",
          made=(a_run,)),
    Fault("sweep of nothing", "sweep", "[usage.arguments]...--table", code=2),
    Fault("seeds of text", "sweep digits_lt --seeds a,b", "[usage.arguments]...--seeds", code=2),
    Fault("share beyond the parts", "sweep digits_lt --share 3/2", "[usage.arguments]...--share 3/2", code=2),
    Fault("sweep of a recipe that there is not", "sweep digits_lr --seeds 0 --output s", "[recipe.missing]...digits_lr",
          new="s/*", lines=2),
    Fault("sweep of a key that there is not", "sweep digits_lt lr=1,2 --seeds 0 --output s",
          "[recipe.unknown_key]...lr", new="s/*", lines=2),
    Fault("cells of a sweep torn", "sweep --table --output s", "[file.format]...s/sweep.json",
         made=(text("s/sweep.json",
          "[["),), new="s/.sweep.lock"),
    Fault("cells of a sweep that are text", "sweep --table --output s", "[file.format]...s/sweep.json",
          made=(text("s/sweep.json",
          '["a", "b"]'),), new="s/.sweep.lock"),
    Fault("figures of a sweep torn", "sweep --table --output s", "test-last.json",
          made=(text("s/sweep.json", '[[["a"], "x"]]'), text("s/x/evaluation/test-last.json", "{")),
          new="s/.sweep.lock"),
    Fault("sweep into a file", "sweep digits_lt --output f", "f", made=(text("f", "mine"),)),
    Fault("verb with a typo", "trian digits_lt",
          "]: no subcommand 'trian'; did you mean  rescom-timm train?", code=2, lines=40),
    Fault("option with a typo", "train digits_lt --epochz 3", "[usage.arguments]...--epochz", code=2),
    Fault("two recipes at once", "train digits_lt inat18_r50", "[usage.arguments]...digits_lt and inat18_r50", code=2),
    Fault("address of the Hub that is none", "train --resume hf://x", "[hub.id]...'hf://x'"),
    Fault("address of the Hub without resuming", "train hf://me/x", "[usage.arguments]...--resume", code=2),
]
# fmt: on

FAULTS = [*READ, *PREDICTED, *PUSHED, *OTHERS]
