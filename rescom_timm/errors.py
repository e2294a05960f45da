"""Errors that a user can meet. Each has a stable code, `area.kind`.

The command line prints `error[area.kind]: message`. Messages may change from release to release, codes do not; code and
tests match codes. Raise a class of this module (or a subclass elsewhere) with a code of CODES:

    raise InputError("index.label", f"{path}: line {n}: label {label!r} is not a whole number from 0")

A code names what the user has to mend, not the place that noticed it: two checks with the same remedy share a code.
"""

from __future__ import annotations

CODES = {
    # fit
    "fit.argument": "arguments of fit that do not go together",
    "fit.changed": "images or files have changed since a fit was begun",
    "fit.diverged": "a training fell far below its start",
    "fit.minutes": "the budget is too small for one pass over the images",
    "fit.other_run": "the folder holds the fit of another command",
    "fit.soup": "runs that cannot be averaged",
    "fit.weights": "pretrained weights cannot be had",
    # the command line and the system
    "usage.arguments": "arguments that a subcommand does not take",
    "file.missing": "a file or folder does not exist",
    "file.exists": "a file or folder exists and is not overwritten",
    "file.permission": "a file may not be read or written",
    "file.failed": "the disk, its connection or the system refused a file",
    "file.kind": "a folder, pipe or device in place of a regular file, or a file in place of a folder",
    "file.format": "a file that is not the JSON, YAML or UTF-8 text it has to be",
    "file.size": "a file larger than what is read of its kind",
    "file.link": "a symbolic link that leads out of its folder",
    "system.memory": "the memory is full",
    "system.package": "an optional package is not installed",
    "system.failed": "an error without a code of its own",
    # the recipe; a check of a section may use the code of another area
    "recipe.value": "a value that a recipe key does not take",
    "recipe.views": "a views policy that cannot be read",
    "recipe.conflict": "recipe keys or data that exclude each other",
    "recipe.missing": "no recipe of that name or path",
    "recipe.file": "a recipe that is not a whole YAML file of keys and plain values",
    "recipe.base": "a `base` that cannot be followed",
    "recipe.override": "an argument that is not key=value or +preset",
    "recipe.unknown_key": "a key that a recipe does not have",
    "recipe.unknown_method": "a method that does not exist",
    "recipe.unknown_preset": "a preset that does not exist",
    "recipe.missing_key": "a key that every recipe needs",
    "recipe.removed_key": "a key of an earlier release that changed results",
    "recipe.secret": "a token or a password in a recipe",
    "recipe.local_file": "a recipe from the Hub that names files of another machine",
    # runs and training
    "run.missing": "a path that is not the folder of a run",
    "run.output": "an output folder that cannot hold runs",
    "run.export": "a trained run whose model could not be exported",
    "run.locked": "a run folder that another process writes to",
    "run.rows": "runs to compare that were evaluated on different images",
    "run.evaluation": "an evaluation, or a table of predictions, that cannot be read",
    "run.not_shared": "processes that see different files of a run",
    "checkpoint.missing": "a checkpoint that does not exist",
    "checkpoint.damaged": "a checkpoint that is incomplete or has changed",
    "checkpoint.differs": "a checkpoint of another recipe, net, teacher, data or way of sharding",
    "checkpoint.average": "a checkpoint without an average of the weights",
    "train.from": "weights to start from that are missing, unreadable or of another net",
    "train.memory": "a net, batch or queue that is too large for the memory",
    "train.metric": "a metric of the caller that cannot be used, raised or gave no finite number",
    "train.callback": "a callback of the caller that cannot be used or raised",
    "train.nonfinite": "a loss or weights that became NaN or infinite",
    "train.distributed": "a distributed launch that the recipe or the trainer does not support",
    "train.device": "a precision that the device does not support",
    "system.process": "a process of a run that was lost or does not answer",
    # networks
    "net.backbone": "a backbone that timm cannot make or that does not take the images",
    "net.class_names": "class names for class features that are missing or repeated",
    "net.weights": "pretrained weights that are missing or unreadable",
    "net.options": "an option that the backbone does not have, or out of bounds",
    "net.size": "a net, or a layer of it, that is too large",
    "net.mismatch": "weights of another net, or not finite",
    "net.trainable": "patterns of trainable weights that match nothing, or freeze random weights",
    "net.branch": "a place where the backbone cannot be split",
    "net.tuning": "a rank or layers of a tuning that the backbone does not have",
    "net.class_features": "class features of other classes, shapes or formats",
    "net.text": "prompts or a model that give no text features",
    "net.projector": "a method that needs a projector, and a net without one",
    "net.unsupported": "the backbone lacks the layers that a method or a tuning needs",
    "net.export": "a net that has no equal among timm's plain models",
    # data sets
    "data.missing": "data of a recipe that is not on this machine",
    "data.one_class": "training data of a single class",
    "data.source": "data.source is not a data set of images that is read",
    "data.split": "a split that the data set does not have",
    "data.column": "a column that is missing, ambiguous or of an unsupported type",
    "data.labels": "labels of a data set that are missing, hidden or outside its classes",
    "data.classes": "class names of two data sets, runs or checkpoints that differ",
    "data.class_folders": "class folders that are missing, empty, double or not UTF-8",
    "data.empty_class": "classes without training images, or too small for a rule",
    "data.rule": "a rule of rows, such as exponential(100) or holdout(0.1), that cannot be read",
    "data.overlap": "images that are in two splits",
    "data.outside": "a file outside of the folder or repository that was named",
    "data.bounds": "a file, or a text in it, that is larger than what is read",
    "data.damaged": "a file of a data set that cannot be read",
    "data.memory": "a data set in memory that is missing or of an unsupported type",
    "data.corrupted": "a corruption, its severity or a folder of corrupted images that is not known",
    # rescom-timm get
    "get.name": "a data set that `get` does not know",
    "get.archive": "a file given with --from, or a downloaded one, is not an archive of this data set",
    "get.checksum": "a file is not the published one",
    "get.space": "the disk has not enough free space",
    "get.list": "a training list has other numbers than the published one",
    "get.terms": "the terms of a data set were not accepted",
    "get.unreachable": "a server does not answer or refuses",
    # rescom-timm pack
    "pack.value": "a size, quality or format that a packed copy does not take",
    "pack.other": "a folder that holds something else than this packed copy",
    # the Hub
    "hub.id": "not an id or address of the Hub, or a missing one",
    "hub.unreachable": "the Hub cannot be reached",
    "hub.not_found": "a repository, revision or file that is not on the Hub, or asks for consent",
    "hub.token": "the token is missing, expired or lacks a right",
    "hub.busy": "the Hub, another push or another writer is busy: try again later",
    "hub.refused": "an answer of the Hub, or of a proxy, that cannot be used",
    "hub.occupied": "a repository that holds, or a push that waits for, something else",
    "hub.secret": "a file to push holds a token or another secret",
    "hub.size": "files on the Hub larger than what is read or than the free disk",
    "hub.damaged": "files on the Hub that do not have their hashes",
    # trained models and their exports
    "model.missing": "a folder or repository that holds no model, or not all files of one",
    "model.details": "values in rescom.json or classes.json that no export has",
    "model.unreadable": "an export that cannot be read",
    "model.damaged": "an export whose files do not have their hashes",
    "model.export": "a model that cannot be exported in this format",
    "model.classes": "class names or counts that do not fit the model",
    # prediction
    "predict.images": "images that cannot be predicted, or none",
    "predict.value": "an argument of predict that is out of range",
    "predict.prior": "a class prior that cannot be used",
    "predict.calibration": "too few or unusable images for prediction sets or an operating point",
    "predict.classes": "class names of costs or an operating point that are unknown, missing or double",
    "predict.costs": "a cost matrix that is no table of finite numbers",
    "predict.embeddings": "a file of embeddings that is damaged or of another model",
    # text
    "text.name": "a name with characters that a terminal executes or hides",
    # lists and index files
    "index.format": "rows or a header of a list that are malformed, repeated or too long",
    "index.missing": "a folder of images that needs a list",
    "index.kind": "row numbers where paths are needed, or the reverse",
    "index.data": "a list that does not fit its data set",
    "index.images": "images of a list that are not in data.source",
    # images
    "image.unreadable": "an image that cannot be decoded",
    "image.size": "images too small for the views, or of different sizes after them",
    # plots, reports and metrics
    "plot.name": "a plot that does not exist",
    "plot.value": "arrays that a plot cannot show",
    "plot.log": "a run without the log that a plot shows",
    "plot.evaluation": "an evaluation that a plot needs is missing or unreadable",
    "plot.images": "the images of an evaluation cannot be read, or are others",
    "plot.queue": "a method without a queue, or a queue without keys",
    "plot.no_mistakes": "a gallery of mistakes of a net that made none",
    "plot.robustness": "results of rescom-timm robustness that are missing, unreadable or of different corruptions",
    "plot.baseline": "a baseline of other images, corruptions or severities",
    "metric.shape": "logits, labels or counts of a wrong shape or type",
    "metric.labels": "labels outside the classes of the net",
    "metric.empty": "a metric of no images",
    # methods, losses and queues
    "method.value": "a setting of a method or loss is out of its bounds or does not fit the others",
    "method.teacher": "the method learns from a teacher, and it has none",
    "queue.size": "a queue has too few slots",
    "queue.shape": "keys and labels do not have the shapes that a queue takes",
    "queue.saved": "a saved queue is of other classes, sizes or widths",
    "queue.mined": "more pairs are mined than there are",
}
"""Every code and what is wrong, by area."""


class CodedError(Exception):
    """Base class. `code` is one of CODES."""

    def __init__(self, code: str, message: str) -> None:
        BaseException.__init__(self, code, message)  # OSError's would take the two for a number and its text
        self.code = code

    def __str__(self) -> str:
        return str(self.args[1])


class InputError(CodedError, ValueError):
    """A value, a file or data that cannot be used."""


class WorkerError(InputError):
    """An error of a data loading worker. torch raises it anew in the main process, by the text of its traceback."""

    def __init__(self, *args: str) -> None:
        """args: code and `error[CODE]: MESSAGE`, or a traceback that ends in that."""
        if len(args) == 1:
            code, _, message = args[0].rpartition("error[")[2].partition("]: ")
            args = code, message.rstrip()
        super().__init__(*args)


class MissingFileError(CodedError, FileNotFoundError):
    """A file or folder does not exist."""


class UnreachableError(CodedError, ConnectionError):
    """A server does not answer or refuses."""


class MissingPackageError(CodedError, ImportError):
    """An optional package is not installed; the message has the command that installs it."""


_BUILT_IN: tuple[tuple[type[BaseException], str], ...] = (
    (FileNotFoundError, "file.missing"),
    (FileExistsError, "file.exists"),
    (PermissionError, "file.permission"),
    (IsADirectoryError, "file.kind"),
    (NotADirectoryError, "file.kind"),
    (OSError, "file.failed"),
    (MemoryError, "system.memory"),
    (ImportError, "system.package"),
)


def code_of(error: BaseException) -> str:
    """The code of any exception: its own, else one by its built-in class."""
    if isinstance(error, CodedError):
        return error.code
    return next((code for kind, code in _BUILT_IN if isinstance(error, kind)), "system.failed")
