"""Lists, index files, folders of images and data sets that cannot be trained on."""

import struct

from tests.faults.fault import Fault, data, empty, folder, gone, half, link, photos, text

HEADER = "# rescom_timm index: 1\n# rows: 2\n# classes: 2\n# class 0: 1 a\n# class 1: 1 b\n"


def listed(kind: str, content: str, said: str, name: str = "l.txt") -> Fault:
    """A list as `index check` reads it."""
    return Fault(kind, f"index check {name}", said, code=3, made=(text(name, content),))


def refused(kind: str, given: str, said: str, *made: object, lines: int = 1) -> Fault:
    """What an index verb refuses."""
    return Fault(kind, given, said, made=made, lines=lines)  # type: ignore[arg-type]


def trained(kind: str, arguments: str, said: str, *made: object, **more: object) -> Fault:
    """A recipe over the small pictures of p with the list l.txt."""
    keys = "data.source=p data.index=l.txt data.test='holdout(0.3)' data.validation=none views.train='crop(8,1)'"
    keys += " method.name=cross_entropy"
    given = f"train digits_lt {keys} train.batch_size=4 speed.workers=0 {arguments} --dry-run"
    return Fault(kind, given, said, made=(photos(), text("l.txt", LIST), *made), **more)  # type: ignore[arg-type]


def named(first: str, second: str, *lines: str) -> str:
    """An index of paths in two classes of these names."""
    counts = [sum(line.endswith(f" {k}") for line in lines) for k in range(2)]
    header = f"# rescom_timm index: 1\n# rows: {len(lines)}\n# classes: 2\n# class 0: {counts[0]} {first}\n"
    return header + f"# class 1: {counts[1]} {second}\n# path label\n" + "".join(f"{line}\n" for line in lines)


ROWS = "# rescom_timm index: 1\n# rows: 10\n# classes: 10\n" + "".join(f"# class {k}: 1\n" for k in range(10))
ROWS += "# row label\n" + "".join(f"{9 - k} {k}\n" for k in range(10))
ROWS = ROWS.replace("0 9\n", "9 9\n").replace("9 0\n", "0 0\n")
LIST = "".join(f"{name}/{k}.png {label}\n" for label, (name, n) in enumerate([("a", 6), ("b", 4)]) for k in range(n))
FLOAT = b"II*\0\x08\0\0\0\x08\0" + b"".join(
    struct.pack("<HHII", tag, kind, 1, value)
    for tag, kind, value in [(256, 3, 1), (257, 3, 1), (258, 3, 32), (259, 3, 1), (262, 3, 1), (273, 4, 110),
                             (279, 4, 4), (339, 3, 3)]
) + b"\0\0\0\0" + struct.pack("<f", 0.5)  # fmt: skip
"""A TIFF of one floating-point pixel."""

# fmt: off
LISTS = [
    listed("list without labels", "a/1.jpg\nb/2.jpg\n", "line 1: "),
    listed("label that is text", "a/1.jpg cat\n", "line 1: ...'cat'"),
    listed("negative label", "a/1.jpg -1\n", "line 1: ...'-1'"),
    listed("label 1.0", "a/1.jpg 1.0\n", "line 1: ...'1.0'"),
    listed("label 1e20", "a/1.jpg 100000000000000000000\n", "line 1: ...'100000000000000000000'"),
    listed("label in other digits", "a/1.jpg ١\n", "line 1: ...'١'"),
    listed("labels from 1", "a/1.jpg 1\nb/2.jpg 2\n", "1 of 3 classes have no image: 0; labels count from 0"),
    listed("labels with a gap", "a/1.jpg 0\nb/2.jpg 2\n", "1 of 3 ...: 1"),
    listed("path twice", "a/1.jpg 0\na/1.jpg 0\nb/1.jpg 1\n", "a/1.jpg"),
    listed("path twice with two labels", "a/1.jpg 0\na/1.jpg 1\n", "a/1.jpg"),
    listed("path from the root", "/a/1.jpg 0\n", "line 1: ...'/a/1.jpg'"),
    listed("empty line in a list", "a/1.jpg 0\n\nb/1.jpg 1\n", "line 2 "),
    listed("empty list", "", "rows"),
    listed("list of blank lines", "\n\n", "rows"),
    listed("index of another format", HEADER.replace("index: 1", "index: 9") + "# row label\n0 0\n1 1\n",
           "format 9...format 1"),
    listed("header that is none", "# rescom_timm index: 1\nrows\n", "line 2: ...'rows'"),
    listed("header with a key twice", HEADER + "# rows: 2\n# row label\n0 0\n1 1\n", "'rows'"),
    listed("header without its end", HEADER, "'# row label'...'# path label'"),
    listed("header that counts wrong", HEADER.replace("rows: 2", "rows: 3") + "# row label\n0 0\n1 1\n", "3"),
    listed("class counts that do not fit", HEADER.replace("0: 1", "0: 9") + "# row label\n0 0\n1 1\n", "class 0"),
    listed("header without a class", HEADER.replace("# class 1: 1 b\n", "") + "# row label\n0 0\n1 1\n",
           "2 classes...'class 1'"),
    listed("row that is no number", HEADER + "# row label\nx 0\n1 1\n", "'x'"),
    listed("row twice", HEADER + "# row label\n1 0\n1 1\n", "1"),
    listed("thousand million classes", "# rescom_timm index: 1\n# rows: 1\n# classes: 1000000000\n# row label\n0 0\n",
           "1000000000 classes...9,999,999"),
    listed("table without a column of images", "x,y\n1,2\n", "x, y...data.image_column", "l.csv"),
    listed("table without a column of labels", "image,z\n1.png,2\n", "image, z...data.label_column", "l.csv"),
    listed("table with two columns of labels", "image,label,Label\n1.png,2,3\n", "label, Label...data.label_column",
           "l.csv"),
    listed("table with an empty label", "image,label\n1.png,a\n2.png,\n", "row 2: ...'label'", "l.csv"),
    listed("table with an empty path", "image,label\n,a\n2.png,b\n", "row 1: ...'image'", "l.csv"),
    listed("table of the header alone", "image,label\n", "rows", "l.csv"),
    listed("table with a cell too many", "image,label\n1.png,a,7\n2.png,b,7\n", "quote text that holds the separator",
           "l.csv"),
    listed("table with an open quote", 'image,label\n"1.png,a\n', "csv", "l.csv"),
    listed("lines that are no JSON", '{"path": "1.png", "label": "a"}\n{"path"\n', "jsonl: line 2: ",
           "l.jsonl"),
    listed("lines that are no objects", "\n[1, 2]\n", "line 2 ", "l.jsonl"),
    listed("several labels of an image", '{"path": "1.png", "label": ["a", "b"]}\n', "row 1: ...'label'", "l.jsonl"),
    listed("path of 5,000 characters", f"{'x' * 5000} 0\ny 1\n", "5,000...4,096"),
    listed("label of 5,000 characters", f"image,label\n1.png,{'x' * 5000}\n2.png,b\n", "5,000...4,096", "l.csv"),
    listed("line of 2 MiB", f'{{"path": "{"x" * 2**21}", "label": 0}}\n', "line 1 ...1,048,576", "l.jsonl"),
    listed("table of 5,001 columns", "image,label" + ",x" * 4999 + "\n1.png,a\n", "5,001 columns...1,000", "l.csv"),
    listed("annotations that are no JSON", "{", "line 1: ...JSON", "l.json"),
    listed("annotations 5,000 levels deep", "[" * 5000, "deep", "l.json"),
    listed("annotations without images", '{"annotations": []}', "images", "l.json"),
    listed("images that are no list", '{"images": 3, "annotations": []}', "images", "l.json"),
    listed("annotation of no image", '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": '
           '[{"image_id": 2, "category_id": 0}]}', "2", "l.json"),
    listed("annotation with a list as its id", '{"images": [{"id": [1], "file_name": "a.jpg"}], "annotations": '
           '[{"image_id": [1], "category_id": 0}]}', "id", "l.json"),
    Fault("list that is a picture", "index check l.txt", "UTF-8", code=3,
          made=(data("l.txt", b"\x89PNG\xff\xfe\n"),)),
    Fault("table that is a picture", "index check l.csv", "UTF-8", code=3,
          made=(data("l.csv", b"\x89PNG\xff\xfd\n"),)),
    Fault("parquet that is none", "index check l.parquet", "parquet", code=3,
          made=(data("l.parquet",
          b"PAR1" * 9),)),
    refused("list that is not there", "index check none.txt", "[file.missing]...none.txt"),
    refused("folder for a list", "index check l", "[file.missing]... l", folder("l")),
    refused("list that is a broken link", "index check l.txt", "[file.missing]...l.txt", link("l.txt", "nowhere")),
    Fault("more classes than are said", "index check l.txt --classes 1", "1", code=3, made=(text("l.txt", LIST),)),
    Fault("decoding without images", "index check l.txt --decode", "[usage.arguments]...--source", code=2, lines=40,
          made=(text("l.txt", LIST),)),
    Fault("images that are not there", "index check l.txt --source p", "6 of 10...l.txt...p",
          code=3, made=(photos(), text("l.txt", LIST), gone("p/a"))),
    Fault("image that is cut off", "index check l.txt --source p --decode", "p/a/3.png",
          code=3, made=(photos(), text("l.txt", LIST), half("p/a/3.png"))),
]

VERBS = [
    refused("rule that there is not", "index make digits 'exponental(10)' -o o.txt", "[data.rule]...exponental"),
    refused("imbalance below 1", "index make digits 'exponential(0.5)' -o o.txt", "[data.rule]...0.5"),
    refused("imbalance of text", "index make digits 'exponential(x)' -o o.txt", "[data.rule]...'exponential(x)'"),
    refused("imbalance that leaves a class empty", "index make digits 'exponential(1000)' -o o.txt",
            "[data.empty_class]...1000"),
    refused("split that there is not", "index make digits 'step(2)' -o o.txt --split dev", "[data.split]...'dev'"),
    refused("labels that are text", "index make digits 'step(2)' -o o.txt --labels l.txt",
            "[index.format]...2, 'x'", text("l.txt", "0\nx\n")),
    refused("labels whose first is text", "index make digits 'step(2)' -o o.txt --labels l.txt",
            "[index.format]: l.txt: ...1, 'x'...9,999,999",
            text("l.txt", "x\n1\n")),
    refused("labels that are too large", "index make digits 'step(2)' -o o.txt --labels l.txt",
            "[index.format]...2, '10000000'", text("l.txt", "0\n10000000\n")),
    refused("labels that are none", "index make digits 'step(2)' -o o.txt --labels l.txt", "[index.format]...l.txt",
          text("l.txt", "")),
    refused("labels that are not there", "index make digits 'step(2)' -o o.txt --labels none.txt", "none.txt"),
    refused("labels that are a picture", "index make digits 'step(2)' -o o.txt --labels l.txt",
            "l.txt ...UTF-8",
            data("l.txt", b"\xff\xfe\x80")),
    refused("names that are too few", "index convert l.txt -o o.txt --names n.txt",
            "[index.format]...1 class name ...2 classes",
            text("l.txt", LIST), text("n.txt", "a\n")),
    refused("names that are not there", "index convert l.txt -o o.txt --names none.txt",
            "[file.missing]...none.txt", text("l.txt", LIST)),
    refused("folder where the list goes", "index make digits 'step(2)' -o o.txt", "o.txt", folder("o.txt")),
    refused("file where the list's folder goes", "index make digits 'step(2)' -o f/o.txt", "f", text("f", "mine")),
    refused("counts of text", "index describe c.json", "c.json", text("c.json", '["a"]')),
    refused("counts that are no JSON", "index describe c.json", "c.json ...JSON", text("c.json", "[")),
    refused("counts of no image", "index describe c.json", "c.json", text("c.json", "[0, 0]")),
    refused("picture of another kind", "index describe l.txt --png t.xyz", "xyz", text("l.txt", LIST)),
    refused("rows beside paths", "index overlap l.txt r.txt", "[index.kind]...row numbers...paths",
            text("l.txt", LIST), text("r.txt", HEADER + "# row label\n0 0\n1 1\n")),
    refused("folder of no class", "init p -o p.yaml", "[data.class_folders]...p ...0 class", folder("p")),
    refused("folder of one class", "init p -o p.yaml", "[data.class_folders]...p ...1 class", photos(a=3)),
    refused("class folder without an image", "init p -o p.yaml", "[data.class_folders]...p/c", photos(),
            folder("p/c")),
    refused("class folders that training lacks", "init p -o p.yaml", "[data.classes]...train...: c",
            photos("p/train", a=3, b=3), photos("p/val", b=1, c=1)),
    refused("class folder on a disk that is not mounted", "init p -o p.yaml",
            "[data.class_folders]...p/c...none", photos(), link("p/c", "/none")),
    refused("test folder on a disk that is not mounted", "init p -o p.yaml",
            "[data.class_folders]...p/test...none", photos("p/train"), link("p/test", "../none")),
    refused("class folder that links to itself", "init p -o p.yaml", "[data.class_folders]...p/c",
            photos(), link("p/c", "c")),
    refused("classes too small for a test set", "init p -o p.yaml", "no class has three images", photos(a=2, b=2)),
    refused("folder that is missing in one that is there", "init p/none -o p.yaml", "p/none", photos()),
    refused("folder that is not there", "init ./none -o p.yaml", "./none"),
    refused("recipe that would be overwritten", "init p -o p.yaml", "[file.exists]...p.yaml", photos(),
            text("p.yaml", "mine")),
    refused("images that cannot be read", "init p -o p.yaml", "2 images cannot be read; repair or remove them",
            photos(), half("p/a/0.png"), empty("p/b/1.png"), lines=3),
    refused("image of floating-point pixels", "init p -o p.yaml", "1 images cannot be read", photos(),
            data("p/a/f.tif", FLOAT), lines=2),
    refused("name that is no UTF-8", "init p -o p.yaml", "[data.class_folders]...UTF-8", photos(),
            lambda place: (place / "p/a/0.png").rename(f"{place}/p/a/\udce9.png")),
    refused("imbalance above what is there", "init p -o p.yaml --imbalance 30", "[data.empty_class]...30", photos()),
    refused("list for a data set", "init digits -o p.yaml --list l.txt", "--list",
            text("l.txt", LIST)),
    refused("validation of all", "init p -o p.yaml --validation 'holdout(1)'", "holdout(1): ...holdout(0.1)",
            photos()),
    refused("column that the list lacks", "init p -o p.yaml --list l.csv --label-column kind",
            "'kind'...image, label", photos(), text("l.csv", "image,label\na/0.png,a\n")),
    refused("list of images that are not there", "init p -o p.yaml --list l.csv",
          "[index.images]...9 of 9...l.csv", photos(),
            text("l.csv", "image,label\n" + "".join(f"x/{k}.png,{'ab'[k % 2]}\n" for k in range(9)))),
    refused("saved data set that names a file outside", "init d -o d.yaml",
            "[data.outside]...state.json...'/etc/passwd'", data("d/x.arrow", b""),
            text("d/dataset_dict.json", '{"splits": ["train"]}'), text("d/train/dataset_info.json", "{}"),
            text("d/train/state.json", '{"_fingerprint": "a", "_data_files": [{"filename": "/etc/passwd"}]}')),
    refused("parquet folder that is damaged", "init d -o d.yaml",
            "[data.damaged]...d", data("d/train.parquet", b"PAR1" + b"x" * 99)),
]

TRAINED = [
    trained("row beyond the data", "data.source=digits data.test=test data.test_index=r.txt data.index=r.txt",
            "[index.data]...99999", text("r.txt", ROWS.replace("9 9\n", "99999 9\n"))),
    trained("rows over a folder", "data.index=r.txt", "[index.kind]...r.txt",
            text("r.txt", HEADER + "# row label\n0 0\n1 1\n")),
    trained("labels that the data contradicts", "data.source=digits data.test=test data.index=r.txt",
            "[index.data]...r.txt...digits", text("r.txt", ROWS)),
    trained("folder without a list", "data.index=all", "[index.missing]... p ...index...'all'"),
    trained("list that training does not find", "data.index=none.txt", "[file.missing]...'none.txt'"),
    trained("images that training does not find", "", "[index.images]...6 of 10...l.txt...p", gone("p/a")),
    trained("images trained and tested on", "data.test=test data.test_index=l.txt",
            "[data.overlap]...10 images...train...test"),
    trained("test list of other classes", "data.test=test data.test_index=t.txt",
          "[index.format]...t.txt: line 1: ...7 ...0 .. 1",
            text("t.txt", "b/3.png 7\n")),
    trained("test list whose header names other classes", "data.index=h.txt data.test=test data.test_index=t.txt",
            "[data.classes]...: asp",
            text("h.txt", named("ant", "bee", "a/0.png 0", "b/0.png 1")),
            text("t.txt", named("bee", "asp", "b/1.png 0", "a/1.png 1"))),
    trained("two Unicode forms of one class", "data.index=h.txt", "[data.classes]...u0301",
            text("h.txt", named("caf\u00e9", "cafe\u0301", "a/0.png 0", "b/0.png 1"))),
    trained("validation list of other classes", "data.index=h.txt data.validation='index(t.txt)'",
            "[data.classes]...: asp",
            text("h.txt", named("ant", "bee", "a/0.png 0", "a/2.png 0", "b/0.png 1", "b/2.png 1")),
            text("t.txt", named("bee", "asp", "b/3.png 0", "a/3.png 1"))),
    trained("source that is not there", "data.source=./none", "./none"),
    trained("source below a folder that is here", "data.source=p/none", "p/none...hf://p/none"),
    trained("source of the Hub that is no id", "data.source=hf://../x", "'hf://../x'"),
    trained("source that is no name", "data.source=a/b/c/d", "a/b/c/d"),
    trained("source that is a file", "data.source=./l.txt", "l.txt"),
    trained("subset of digits", "data.source=digits data.index=all data.test=dev", "[data.split]...'dev'"),
    trained("hold-out of all", "data.validation='holdout(1.5)'", "holdout(1.5)"),
    trained("hold-out of nothing", "data.validation='holdout(0.0001)'", "[data.empty_class]...holdout(0.0001)"),
    trained("validation that there is not", "data.validation=some", "'some'"),
    trained("unused rows of a list", "data.validation='unused(3)'",
          "[recipe.conflict]...unused(3)...index(FILE)"),
    trained("class without a training image", "data.index=c.txt", "[index.format]...1 of 3...: 1", text("c.txt",
          "a/0.png 0\nb/0.png 2\n")),
    trained("test image that is cut off", "data.test=test data.index=b.txt data.test_index=t.txt", "a/0.png",
            text("t.txt", "a/0.png 0\n"), text("b.txt", LIST.replace("a/0.png 0\n", "")), half("p/a/0.png")),
    trained("training image that is empty", "train.batch_size=7", "png", *(empty(f"p/a/{k}.png") for k in range(6))),
    trained("images of several sizes", "views.train=none train.batch_size=7",
            "[image.size]...views.train", photos("p/c", 9, c=3),
            text("l.txt", LIST + "".join(f"c/c/{k}.png 2\n" for k in range(3)))),
    trained("images too small for the crop", "views.train=crop(32) train.batch_size=7",
            "[image.size]...views.train: row ...8 x 8...32"),
    trained("images too small for the padded crop", "'views.train=resize(8) | crop(32,4)' train.batch_size=7",
            "[image.size]...views.train: row ...8 x 8...32"),
    trained("evaluation images of several sizes", "'views.train=upscale(8)' train.batch_size=7",
            "[image.size]...views.eval", photos("p/c", 9, c=3),
            text("l.txt", LIST + "".join(f"c/c/{k}.png 2\n" for k in range(3)))),
    trained("images too small for the net", "net.backbone=vit_tiny_patch16_224", "8"),
]
# fmt: on

FAULTS = [*LISTS, *VERBS, *TRAINED]
