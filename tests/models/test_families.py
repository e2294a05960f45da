"""One small model of every timm family through build, a ResCom step and export. All:  pytest -m slow -k families"""

import pytest
import timm
import torch

from rescom_timm.methods.rescom import QueueConfig, ResCom, RescomConfig
from rescom_timm.models.net import ProjectorConfig, create_model
from tests.raises import raises

QUICK = """
    test_byobnet test_convnext test_efficientnet test_mambaout test_maxvit test_nfnet test_resnet test_vit
    test_vit_relpos lcnet_035 ghostnet_050 starnet_s050 repghostnet_050
"""

SLOW = """
    beitv2_base_patch16_224 halonet26t cait_xxs24_224 coat_lite_tiny convit_tiny convmixer_1024_20_ks9_p14
    cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_m cspnext_tiny davit_tiny deit_tiny_patch16_224
    densenet121 dla46_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1
    efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
    hardcorenas_a hgnetv2_b0 hiera_tiny_224 hieradet_small hrnet_w18_small iformer_t inception_next_atto
    inception_resnet_v2 inception_v3 inception_v4 lcnetv2_base levit_128s lowformer_b0 caformer_s18 resmlp_12_224
    mobilevit_xxs mvitv2_tiny nest_tiny nextvit_small pit_ti_224 pvt_v2_b0 rdnet_tiny regnetx_002 repvit_m0_9
    res2net50_14w_8s resnest14d resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1
    skresnet18 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224 swinv2_tiny_window8_256
    tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny vit_tiny_r_s16_p8_224
    vitamin_small_224 volo_d1_224 ese_vovnet19b_dw legacy_xception xception41 xcit_nano_12_p8_224
"""

REFUSED = {"caformer_s18", "crossvit_tiny_240", "efficientvim_m1", "volo_d1_224"}
"""Trained like the others, but of these timm has no plain classifier that takes our weights."""

TOO_LARGE = {
    "deepseek_vit", "gemma4_vit", "mobilenetv5", "naflexvit", "nasnet", "pnasnet", "qwen3_vit",
    "vision_transformer_sam",
}  # fmt: skip
"""Families whose smallest member does not fit a test: not tried."""


def check(name):
    torch.manual_seed(0)
    net = create_model(name, 5, projector=ProjectorConfig(dim=16))
    config = RescomConfig(queue=QueueConfig(per_class=2), negatives=8)
    method = ResCom(net, torch.tensor([9, 7, 5, 3, 1]), config).train()
    size = net.encoder.pretrained_cfg["input_size"]
    batch = {"image": torch.randint(0, 256, (2, 2, *size), dtype=torch.uint8), "label": torch.tensor([0, 1])}
    outputs = method(batch)
    outputs["loss"].backward()
    assert outputs["loss"].isfinite() and outputs["logits"].shape == (4, 5)
    grads = [p.grad for p in net.encoder.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads) and any(g.any() for g in grads)
    if name in REFUSED:
        with raises("net.export", name):
            net.to_timm()
    else:
        net.to_timm()


@pytest.mark.parametrize("name", QUICK.split())
def test_families_quick(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW.split())
@pytest.mark.filterwarnings("ignore")
def test_families_all(name):
    check(name)


@pytest.mark.slow
def test_families_are_all_named():
    tried = {timm.models.model_entrypoint(name).__module__.split(".")[-1] for name in (QUICK + SLOW).split()}
    missing = set(timm.list_modules()) - tried - TOO_LARGE - {"cifar_resnet"}
    assert not missing, f"timm has new families: add one small model of each: {sorted(missing)}"
