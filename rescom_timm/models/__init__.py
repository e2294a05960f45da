"""Nets: any timm backbone with a classifier and a projector, and the CIFAR ResNets in timm's registry."""

from rescom_timm.models import cifar_resnet as cifar_resnet  # registers resnet20_cifar ... in timm
