"""Export to ONNX."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch

from rescom_timm.errors import InputError, MissingPackageError
from rescom_timm.inference.pretrained import Pretrained, from_pretrained
from rescom_timm.inference.program import Classifier, about, check_logits, example
from rescom_timm.io import atomic_path, errors_named


def export_onnx(source: Pretrained | str | Path, path: str | Path) -> Path:
    """Write a classifier as ONNX: `images` float32 (N, 3, H, W), already normalised, to `logits` (N, K), any N.

    The metadata holds the fields of program.about, each as JSON (strings as they are). The logits are compared with
    onnxruntime's. Raises MissingPackageError without the extra (pip install rescom-timm[onnx]), and InputError
    (model.export) if the net cannot be exported or the logits differ; an earlier file stays then.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        message = "ONNX export needs more packages: pip install 'rescom-timm[onnx]'"
        raise MissingPackageError("system.package", message) from error
    model = source if isinstance(source, Pretrained) else from_pretrained(source)
    path = Path(path)
    net, images = Classifier(model.net), example(model)
    with errors_named(path), atomic_path(path) as new:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's exporter warns about itself
                torch.onnx.export(
                    net, (images,), new, dynamo=True, input_names=["images"], output_names=["logits"],
                    dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, external_data=False, verbose=False,
                )  # fmt: skip
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            message = f"this net cannot be exported to ONNX: {str(error).splitlines()[0]}"
            raise InputError("model.export", message) from error
        written = onnx.load(new)
        record = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about(model).items()}
        onnx.helper.set_model_props(written, record)
        onnx.save(written, new)
        session = onnxruntime.InferenceSession(new, providers=["CPUExecutionProvider"])
        check_logits(net, images, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), "ONNX model")
    return path
