"""What a method remembers is the same in every process, and holds the images of all of them."""

import torch
import torch.distributed as dist

from rescom_timm.methods import DroLtConfig, MocoConfig, PacoConfig, ProcoConfig
from tests.engine.child import together
from tests.methods.stub import batch, make


def remembered(rank):
    """One pass of a batch of this process's own through every method."""
    for config, names, rows in (
        (MocoConfig(queue_size=32), ["queue.keys", "queue.labels"], 16),
        (PacoConfig(queue_size=32), ["queue.keys", "queue.labels"], 16),
        (PacoConfig(queue_size=32, momentum=None), ["queue.keys", "queue.labels"], 16),
        (DroLtConfig(), ["centroids", "known"], None),
        (ProcoConfig(), ["means", "numbers", "seed"], None),
    ):
        method = make(config)
        method(batch(views=method.views, seed=rank))
        for name in names:
            own = method.state_dict()[name]
            others = [torch.empty_like(own) for _ in range(2)]
            dist.all_gather(others, own)
            assert own.any() and torch.equal(*others), (config, name)
        assert rows is None or method.queue.valid.sum() == rows


def test_queues_and_centroids_are_the_same_in_both_processes():
    together(remembered, 2)
