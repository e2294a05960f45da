"""Run by test_training.py in two processes: trains every method a few accumulated steps and compares its state."""

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs

from rescom_timm.methods import METHODS, ExpertsConfig, MocoConfig, PacoConfig, create_method
from rescom_timm.methods.distillation import Teacher
from rescom_timm.methods.rescom import QueueConfig, RescomConfig
from rescom_timm.models.net import ProjectorConfig, create_model
from tests.methods.stub import COUNTS

QUEUES = {
    "moco": MocoConfig(queue_size=16, momentum=0.9),
    "paco": PacoConfig(queue_size=16, momentum=0.9),
    "rescom": RescomConfig(queue=QueueConfig(per_class=4), negatives=8),
    "experts": ExpertsConfig(experts=2, views=2),
}


def batch(views, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (4, views, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return {"image": images, "label": torch.randint(0, 4, (4,), generator=generator)}


def main():
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    rank, world = accelerator.process_index, accelerator.num_processes
    assert world == 2
    for name, (config, _) in METHODS.items():
        torch.manual_seed(0)
        net = create_model("resnet20_cifar", 4, projector=ProjectorConfig(hidden=8, dim=6))
        method = create_method(net, COUNTS, QUEUES.get(name) or config())
        if method.needs_teacher:
            method.teacher = Teacher(create_model("resnet20_cifar", 4, projector=ProjectorConfig(hidden=8, dim=6)))
        optimizer = torch.optim.SGD([p for p in method.net.parameters() if p.requires_grad], 0.01)
        method.net, optimizer = accelerator.prepare(method.net, optimizer)
        method.train()
        start = {n: v.clone() for n, v in method.state_dict().items()}
        for step in range(3):
            method.set_epoch(step, 3)
            for part in range(2):
                data = batch(method.views, 100 * step + 10 * part + rank)
                if part == 0:
                    with accelerator.no_sync(method.net):
                        accelerator.backward(method(data)["loss"] / 2)
                else:
                    accelerator.backward(method(data)["loss"] / 2)
            optimizer.step()
            method.after_step()
            optimizer.zero_grad()
        local = {n for n, _ in method.net.named_buffers()}  # BatchNorm's and the mean feature: averaged when saved
        for key, value in method.state_dict().items():
            if key.removeprefix("net.") in local or ("momentum_net" in key and ".running_" in key):
                continue
            parts = [torch.empty_like(value) for _ in range(world)]
            dist.all_gather(parts, value.contiguous())
            assert torch.equal(*parts), (name, key)
        moved = [n for n, v in method.state_dict().items() if not torch.equal(v, start[n])]
        assert moved or method.second_stage, name
        if rank == 0:
            print(name, len(moved), flush=True)
    if rank == 0:
        print("all equal", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
