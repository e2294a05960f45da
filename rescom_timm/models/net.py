"""Net: one forward of any timm backbone gives features, logits and embeddings; exported as a plain timm model.

Shapes: N images of (3, H, W), F features of the backbone, K classes, D the width of an embedding.
timm, which takes seconds to import, is imported where a net is made: recipes are read without it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rescom_timm.errors import InputError
from rescom_timm.hub_client import online
from rescom_timm.io import read_json
from rescom_timm.models.bounds import MAX_MODULES, MAX_NUMBERS, MAX_OPTION, budget, check_values
from rescom_timm.models.classifiers import ClassifierConfig, Cosine, classifier
from rescom_timm.models.trainable import freeze_statistics
from rescom_timm.models.tuning import TuningConfig, tune, untuned

PROJECTOR = "projector."
"""Prefix of a projector's weights."""
MAX_WIDTH = MAX_OPTION
"""Of a projector's layers: more is a typing mistake, which would ask for gigabytes."""


@dataclass(frozen=True)
class ProjectorConfig:
    """The MLP behind the embeddings: Linear(F, hidden), BatchNorm1d, ReLU, Linear(hidden, dim)."""

    hidden: int | None = None
    """Width of the hidden layer; None: that of the features, as in the paper's d-d-128."""
    dim: int = 128
    """D, the width of an embedding and of a queue's keys."""

    def __post_init__(self) -> None:
        if not all(1 <= width <= MAX_WIDTH for width in (self.dim, self.hidden or 1)) or self.hidden == 0:
            raise InputError("recipe.value", f"net.projector: hidden and dim must be from 1 to {MAX_WIDTH:,}")


@dataclass(frozen=True)
class NetConfig:
    """The backbone, its classifier and projector, and which of its weights train."""

    backbone: str = "resnet32_cifar"
    """A name of timm.list_models(), with its tag for pretrained weights: resnet152.tv_in1k."""
    pretrained: bool = False
    """Start from timm's weights of that name (or from `weights_file`)."""
    weights_file: str | None = None
    """Local file of weights in timm's format instead of the Hub's; needs pretrained: true."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed on to timm.create_model: drop_path_rate, img_size, global_pool, ..."""
    projector: ProjectorConfig = ProjectorConfig()
    trainable: tuple[str, ...] = ("all",)
    """Weights of the backbone that train: all, none, norms, biases, last_block, or patterns such as layer4.2.*. The
    heads always train. With a tuning other than full, all means the weights that the tuning adds; others are added."""
    tuning: TuningConfig = TuningConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    frozen_precision: Literal["float32", "bf16"] = "float32"
    """bf16: frozen matrices and convolutions of the backbone are kept in bfloat16, in half the memory. Needs
    train.precision: bf16, and gives the same results as that alone."""
    frozen_statistics: bool = False
    """Do not update the running statistics of BatchNorm."""

    def __post_init__(self) -> None:
        if self.weights_file is not None and not self.pretrained:
            raise InputError("recipe.conflict", "weights_file needs pretrained: true")
        object.__setattr__(self, "backbone", timm_name(self.backbone))

    def untrained(self) -> NetConfig:
        """The same net without initial weights, for weights that are loaded anyway."""
        return replace(self, pretrained=False, weights_file=None)


class NoProjector(nn.Module):
    """A projector without weights and with embeddings of width 0, for methods that use none.

    Loading ignores the projector that checkpoints and exports of 0.2.0 hold for every method.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, F) to (N, 0)."""
        return features.new_empty(len(features), 0)

    def _load_from_state_dict(self, *_: Any) -> None:
        pass


class Outputs(NamedTuple):
    """Features (N, F), logits (N, K), embeddings (N, D): unit vectors, float32 or wider; D = 0 without a projector."""

    features: Tensor
    logits: Tensor
    embeddings: Tensor


class Net(nn.Module):
    """A timm encoder, a classifier and a projector, if any.

    Images are eight-bit (N, 3, H, W), which the net normalises, or floats that are normalised already.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        projector: ProjectorConfig | None = ProjectorConfig(),
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        recreate: dict[str, object] | None = None,
        head: ClassifierConfig = ClassifierConfig(),  # noqa: B008 (frozen)
    ) -> None:
        """encoder: images -> (N, F), with timm's attribute `head_hidden_size` = F. projector: None for none.

        mean, std: of each channel, for images scaled to 0..1. recreate: timm.create_model's arguments that make the
        encoder again, for to_timm.
        """
        super().__init__()
        width = int(encoder.head_hidden_size)  # type: ignore[arg-type]
        self.encoder = encoder
        self.classifier = classifier(head, width, num_classes)
        self.projector: nn.Module = NoProjector()
        if projector is not None:
            hidden = projector.hidden or width
            self.projector = nn.Sequential(
                nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, projector.dim)
            )
        self.recreate, self.tuning, self.head = recreate, TuningConfig(), head
        self.frozen_statistics = False
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Net:
        """Set training mode, except for frozen statistics."""
        super().train(mode)
        if self.frozen_statistics:
            freeze_statistics(self.encoder)
        return self

    @property
    def embedding_width(self) -> int:
        """D. Raises InputError for a net without a projector."""
        if not isinstance(self.projector, nn.Sequential):
            raise InputError("net.projector", "the method needs a projector: make the net with a ProjectorConfig")
        return int(self.projector[-1].out_features)  # type: ignore[arg-type]

    def drop_projector(self) -> None:
        """Remove the projector, for methods that use no embeddings.

        Nets are made with one all the same, so that later random numbers are the same for every method.
        """
        self.projector = NoProjector()

    def normalize(self, images: Tensor) -> Tensor:
        """Eight-bit images to normalised floats; floats stay."""
        if images.dtype != torch.uint8:
            return images
        return images.to(self.mean.dtype).div_(255).sub_(self.mean).div_(self.std)  # in place: 3 times as fast

    def forward(self, images: Tensor) -> Outputs:
        """Outputs of images (N, 3, H, W)."""
        features = self.encoder(self.normalize(images))
        embeddings = self.projector(features)
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        if embeddings.shape[1]:
            embeddings = F.normalize(embeddings, dim=1)
        return Outputs(features, self.classifier(features), embeddings)

    def classify(self, images: Tensor) -> Tensor:
        """Logits (N, K) from encoder and classifier, as at inference.

        The classifier runs in full precision: bfloat16 makes ties, and a tie goes to the lower class, which is often
        the more frequent one.
        """
        return self.classify_features(self.encoder(self.normalize(images)))

    def classify_features(self, features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, F), as `classify` gives them."""
        with torch.autocast(features.device.type, enabled=False):
            return self.classifier(features.to(next(self.classifier.parameters()).dtype))

    @torch.no_grad()
    def to_timm(self) -> nn.Module:
        """A plain timm model with these weights and logits, in evaluation mode on the CPU.

        For a cosine classifier, which timm does not have, its logits differ by one factor an image, near 1, that
        changes no ranking. Raises InputError for a backbone whose classifier in timm cannot take these weights.
        """
        import timm

        if self.recreate is None:
            raise InputError("net.export", "timm's name of this net is unknown: make it by rescom_timm.create_model")
        net = copy.deepcopy(self).cpu().float().eval()
        untuned(net.encoder)  # before the work of making a model
        model = timm.create_model(**self.recreate, num_classes=self.classifier.out_features).eval()
        name = self.recreate["model_name"]
        channels, *default = model.pretrained_cfg["input_size"]
        size: Any = self.recreate.get("img_size") or default
        images = torch.rand(2, channels, *((size, size) if isinstance(size, int) else size))
        head: Any = net.classifier
        classifier = head.as_linear() if hasattr(head, "as_linear") else head
        if isinstance(head, Cosine):
            classifier = head.ranking_alike(float(net.encoder(images).norm(dim=1).mean()))
        if type(classifier) is not nn.Linear:
            raise InputError("net.export", f"the classifier ({type(classifier).__name__}) is not linear, as timm's are")
        try:
            for own in _output_layers(model, classifier):
                own.weight.copy_(classifier.weight.view_as(own.weight))
                own.bias.copy_(classifier.bias)
            model.load_state_dict({**model.state_dict(), **untuned(net.encoder).state_dict()})
            agree = same_logits(model, net, images)
        except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
            raise InputError("net.export", f"cannot export {name} as a plain timm model: {error}") from error
        if not agree:
            raise InputError("net.export", f"cannot export {name} as a plain timm model: timm's head differs")
        return model


@torch.no_grad()
def same_logits(model: nn.Module, net: Net, images: Tensor) -> bool:
    """Whether a plain timm model gives the net's logits; with a cosine classifier up to one factor above 0 an image."""
    found, own = model(images), net.classify(images)
    if isinstance(net.classifier, Cosine):
        found, own = F.normalize(found, dim=1), F.normalize(own, dim=1)
    return torch.allclose(found, own, rtol=1e-3, atol=1e-4)


def _output_layers(model: Any, classifier: nn.Linear) -> list[Any]:
    """Layers of timm's head, or heads, with the classifier's shape: linear, or a 1x1 convolution."""
    heads = model.get_classifier()
    modules = [m for head in (heads if isinstance(heads, tuple) else (heads,)) for m in head.modules()]
    shape = classifier.weight.shape
    return [m for m in modules if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.flatten(1).shape == shape]


def check_weights(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    """Raises InputError, naming the first few, if weights do not fit `own`.

    They fit with the same names, shapes and kinds of number (floats of any width are one kind), without NaN or
    infinity. where: their source. A projector that `own` lacks is ignored: 0.2.0 saved one for every method.
    """
    wrong = [f"{name} is missing" for name in own if name not in weights]
    projector = any(name.startswith(PROJECTOR) for name in own)
    for name, value in weights.items():
        if name.startswith(PROJECTOR) and not projector:
            continue
        if name not in own:
            wrong.append(f"{name} is not known")
        elif value.shape != own[name].shape:
            wrong.append(f"{name} is {tuple(value.shape)}, not {tuple(own[name].shape)}")
        elif value.is_floating_point() != own[name].is_floating_point():
            wrong.append(f"{name} holds {str(value.dtype).removeprefix('torch.')}")
        elif value.is_floating_point() and not bool(value.isfinite().all()):
            wrong.append(f"{name} is not finite")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError("net.mismatch", f"{where} does not fit: {', '.join(wrong[:3])}{more}")


HUB = ("hf-hub:", "hf_hub:")
"""What timm's names of models on the Hub begin with."""


def timm_name(name: str) -> str:
    """The name in timm of hf://owner/name; any other name as it is."""
    return f"{HUB[0]}{name.removeprefix('hf://')}" if name.startswith("hf://") else name


def check_backbone(name: str) -> None:
    """Raises InputError, naming the nearest, if timm knows no such model."""
    if name.startswith((*HUB, "local-dir:")):
        return
    import timm

    base = name.split(".")[0]
    if not timm.is_model(base):
        near = get_close_matches(base, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else "; see timm.list_models()"
        raise InputError("net.backbone", f"timm has no model {name!r}{hint}")


class PretrainedCfg(TypedDict, total=False):
    """What timm knows of a backbone's weights: their images, and where they are; it has more keys."""

    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float
    interpolation: str
    fixed_input_size: bool
    hf_hub_id: str
    url: str
    file: str


def pretrained_cfg(backbone: str) -> PretrainedCfg:
    """What timm knows of a backbone and its weights: input_size, mean, std, crop_pct, url ...

    Raises InputError for a name, or a tag after its dot, that timm does not know.
    """
    import timm

    backbone = timm_name(backbone)
    check_backbone(backbone)
    if ":" in backbone:
        with online() if backbone.startswith(HUB) else nullcontext():
            return cast(PretrainedCfg, describe(backbone, {}).pretrained_cfg)
    try:
        return timm.get_pretrained_cfg(backbone, allow_unregistered=False).to_dict()  # type: ignore[union-attr]
    except RuntimeError as error:
        known = ", ".join(timm.list_models(f"{backbone.split('.')[0]}.*", pretrained=True)[:5])
        raise InputError("net.backbone", f"{error} {f'There are {known}' if known else ''}".strip()) from None


CONTROL = (
    "cache_dir", "checkpoint_path", "device", "dtype", "exportable", "feature_cfg", "features_only", "kwargs_filter",
    "model_name", "no_jit", "num_classes", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
    "pretrained_filter_fn", "pretrained_model_args", "pretrained_strict", "scriptable",
)  # fmt: skip
"""Arguments of timm's builders that are no options of a model: they load weights, name files, place or cut the net."""


def describe(backbone: str, options: Mapping[str, object], numbers: int = MAX_NUMBERS) -> nn.Module:
    """The encoder that create_model would make, on the meta device: its shapes without their memory.

    numbers: the most weights and buffers that it may have. Raises InputError for options out of bounds, for one that is
    no argument of the backbone's class (naming the nearest), and for a net above `numbers` or with too many modules.
    """
    import timm
    from timm.models import load_model_config_from_hf

    scheme, colon, place = backbone.partition(":")
    if colon:
        local = scheme == "local-dir"
        arguments = (
            read_json(Path(place) / "config.json").get("model_args") if local else load_model_config_from_hf(place)[2]
        )
        check_values(arguments if isinstance(arguments, dict) else {}, f"model_args of {place}")
    check_values(options, "options")
    with budget(modules=MAX_MODULES, meta=True):
        _check_names(backbone, options)
    with budget(numbers, MAX_MODULES, meta=True):
        return timm.create_model(backbone, num_classes=0, **options)


def _check_names(backbone: str, options: Mapping[str, object]) -> None:
    """Raises InputError for an option that is no argument of the class; timm's other arguments may read files."""
    if not options:
        return
    import timm

    taken: set[str] = set()
    anything = False
    for kind in type(timm.create_model(backbone, num_classes=0)).__mro__[:-2]:  # all but nn.Module and object
        parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
        taken |= {one.name for one in parameters if one.kind is not one.VAR_KEYWORD}
        anything |= any(one.kind is one.VAR_KEYWORD for one in parameters)
    known = sorted(taken - {"self", *CONTROL})
    for name in options:
        if name in CONTROL or not (name in known or anything):
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise InputError("net.options", f"options: {backbone} has no option {name!r}; {hint}")


def create_model(
    backbone: str,
    num_classes: int,
    *,
    pretrained: bool = False,
    weights_file: str | None = None,
    projector: ProjectorConfig | None = ProjectorConfig(),
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    tuning: TuningConfig = TuningConfig(),  # noqa: B008 (frozen)
    head: ClassifierConfig = ClassifierConfig(),  # noqa: B008 (frozen)
    **options: object,
) -> Net:
    """A Net over any timm backbone by name.

    projector: None for none. mean, std: of the images scaled to 0..1; those of the backbone's pretrained weights by
    default. tuning: added to a frozen backbone. head: the classifier. options: of the backbone's class, passed on to
    timm.create_model. Raises InputError for an unknown name, and as `tune` does.
    """
    import timm

    backbone = timm_name(backbone)
    check_backbone(backbone)
    overlay = {"file": str(Path(weights_file).expanduser())} if weights_file else None
    asks = backbone.startswith(HUB) or (pretrained and not weights_file and not backbone.startswith("local-dir:"))
    with online() if asks else nullcontext():
        if options or ":" in backbone:  # what is not timm's own may ask for any size
            describe(backbone, options)
        encoder = timm.create_model(
            backbone, pretrained=pretrained, num_classes=0, pretrained_cfg_overlay=overlay, **options
        )
    tuning = tune(encoder, tuning, num_classes)
    cfg: dict[str, Any] = encoder.pretrained_cfg
    made = {"model_name": backbone, **options}
    net = Net(encoder, num_classes, projector, mean or cfg["mean"], std or cfg["std"], made, head)
    net.tuning = tuning
    return net
