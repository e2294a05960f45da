"""An export as ONNX."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from rescom_timm.nets.net import Net
from rescom_timm.sharing.pretrained import Pretrained, from_pretrained


class _Classifier(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.encoder, self.classifier = net.encoder, net.classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.encoder(images))


def export_onnx(source: Pretrained | str | Path, path: str | Path) -> Path:
    """Write a classifier as ONNX: `images` float32 (N, 3, H, W), already normalised, to `logits` (N, K), any N.

    Class names, mean, std and the evaluation policy are in the file's metadata. The logits are compared with
    onnxruntime's. Raises ImportError without the extra (pip install rescom-timm[onnx]), and ValueError where the net
    cannot be exported or the logits differ (no file is left then).
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise ImportError("ONNX export needs more packages: pip install 'rescom-timm[onnx]'") from error
    model = source if isinstance(source, Pretrained) else from_pretrained(source)
    path = Path(path)
    net = _Classifier(copy.deepcopy(model.net)).cpu().float().eval()
    images = torch.randn(3, *model.input_size, generator=torch.Generator().manual_seed(0))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporter warns about itself
            torch.onnx.export(
                net, (images,), path, dynamo=True, input_names=["images"], output_names=["logits"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, external_data=False, verbose=False,
            )  # fmt: skip
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        path.unlink(missing_ok=True)
        raise ValueError(f"this net cannot be exported to ONNX: {str(error).splitlines()[0]}") from error
    written = onnx.load(path)
    record = {
        "class_names": json.dumps(model.class_names),
        "mean": json.dumps(model.net.mean.flatten().tolist()),
        "std": json.dumps(model.net.std.flatten().tolist()),
        "eval_policy": model.eval_policy,
    }
    onnx.helper.set_model_props(written, record)
    onnx.save(written, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (images, images[:1]):
        with torch.no_grad():
            own = net(batch)
        (theirs,) = session.run(None, {"images": batch.numpy()})
        if not torch.allclose(torch.from_numpy(theirs), own, rtol=1e-3, atol=1e-4):
            path.unlink()
            raise ValueError("the ONNX model gives other logits than the net; not exported")
    return path
