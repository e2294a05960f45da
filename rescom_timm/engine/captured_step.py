"""A whole training step as one CUDA graph: for nets so small that launching kernels takes longer than running them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rescom_timm.config.recipe import RecipeError

Batch = dict[str, Tensor]
WARM_UP = 3
"""Steps of a training that run as they are: what they compile, tune and allocate cannot be captured."""


class CapturedStep:
    """`step(batch)`: forward, loss, queue, backward and optimizer, over batches of one shape.

    On a GPU it is captured once and replayed for each batch; elsewhere it runs each time, over the same tensors and
    with the same optimizer.
    """

    def __init__(self, step: Callable[[Batch], Batch], optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        """step: gives scalars, and waits for nothing.

        optimizer: as accelerate prepared it; its learning rates, floats that a schedule sets, are passed on as tensors.
        Raises RecipeError for an optimizer that cannot be captured.
        """
        if not all("fused" in group for group in optimizer.param_groups):
            raise RecipeError(
                "recipe.conflict",
                "speed.capture: the step of this optimizer cannot be captured; use sgd, momentum, adam or adamw "
                "(optimizer.name), or turn it off",
            )
        self.step, self.optimizer, self.device = step, optimizer, device
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.batch: Batch = {}
        self.outputs: Batch = {}
        self.graph: Any = None
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.done = 0

    def forget(self) -> None:
        """Capture again before the next step, as where the method has changed on the host."""
        self.graph = None

    def __call__(self, batch: Batch) -> Batch:
        """Do a step. batch: image, label. The scalars that it gives are overwritten by the next."""
        for name in ("image", "label"):
            if name not in self.batch:
                self.batch[name] = batch[name].clone()
            self.batch[name].copy_(batch[name])
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        if self.stream is None:
            return self._run()
        if self.done < WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self._run()
            torch.cuda.current_stream().wait_stream(self.stream)
            self.done += 1
            return outputs
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # Other threads (of a loader, say) go on with what they do.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = self._run()
        self.graph.replay()
        return dict(self.outputs)

    def _run(self) -> Batch:
        groups = self.optimizer.param_groups
        floats = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group.update(lr=rate, fused=True, foreach=False)
            if "capturable" in group:
                group["capturable"] = self.stream is not None
        try:
            return {name: value.detach() for name, value in self.step(self.batch).items()}
        finally:
            for group, lr in zip(groups, floats, strict=True):
                group["lr"] = lr
