"""The smallest member of every family: name, constructor arguments, image size in pixels."""

from functools import cache
from typing import Any

import torch

from dynexit.models.backbones import Backbone, build_backbone

TINY: dict[str, tuple[str, dict[str, Any], int]] = {
    "T2T-ViT": ("t2t_vit_7", {"embed_dim": 24, "depth": 3, "num_heads": 2, "token_dim": 8}, 32),
    "T2T-ViT transformer stem": ("t2t_vit_t_14", {"embed_dim": 24, "depth": 3, "num_heads": 2, "token_dim": 8}, 48),
    "ViT": ("test_vit", {}, 32),
    "ViT mean": ("test_vit4", {}, 48),
    "ViT attention pool": ("test_vit3", {}, 32),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", {"embed_dim": 32, "depth": 3, "num_heads": 2}, 42),
    "CLIP": ("vit_base_patch32_clip_224", {"embed_dim": 32, "depth": 3, "num_heads": 2}, 64),
    "DeiT": ("deit_tiny_patch16_224", {"embed_dim": 32, "depth": 3, "num_heads": 2}, 48),
    "DeiT distilled": ("deit_tiny_distilled_patch16_224", {"embed_dim": 32, "depth": 3, "num_heads": 2}, 32),
    "EVA": ("eva02_tiny_patch14_224", {"embed_dim": 32, "depth": 3, "num_heads": 2}, 42),
    "EVA mixed": ("vit_small_patch16_rope_mixed_224", {"embed_dim": 32, "depth": 3, "num_heads": 2}, 48),
    "DINOv3": ("vit_small_patch16_dinov3", {"embed_dim": 32, "depth": 3, "num_heads": 2}, 48),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 8, "depths": [1, 2, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 4},
        64,
    ),
    "SwinV2": (
        "swinv2_tiny_window8_256",
        {"embed_dim": 8, "depths": [1, 2, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 4},
        64,
    ),
    "ConvNeXt": ("test_convnext", {}, 32),
    "ConvNeXtV2": ("convnextv2_atto", {"depths": [1, 2, 2, 1], "dims": [8, 12, 16, 20]}, 64),
    "ResNet": (
        "resnet18",
        {"layers": [2, 2, 2, 2], "channels": [8, 12, 16, 20], "stem_type": "deep", "stem_width": 6, "output_stride": 8},
        32,
    ),
    "ResNet bottleneck": ("resnet50", {"layers": [1, 2, 1, 1], "channels": [4, 6, 8, 10]}, 64),
    "ResNeXt": (
        "resnext50_32x4d",
        {"layers": [1, 2, 1, 1], "channels": [8, 12, 16, 20], "cardinality": 4, "base_width": 16},
        64,
    ),
    "RegNet": ("regnety_002", {"w0": 8, "wa": 8.0, "wm": 2.0, "depth": 6, "group_size": 4}, 64),
    "RegNetZ": ("regnetz_005", {"w0": 8, "wa": 8.0, "wm": 2.0, "depth": 6, "group_size": 4}, 64),
    "DaViT": ("davit_tiny", {"embed_dims": [8, 12, 16, 24], "num_heads": [1, 2, 2, 4], "depths": [1, 1, 2, 1]}, 64),
    "MaxViT": ("test_maxvit", {}, 64),
    "MobileNetV3": ("mobilenetv3_small_050", {}, 32),
    "EfficientNet": ("test_efficientnet", {}, 32),
    "EfficientViT": ("efficientvit_b0", {"head_widths": [16, 24]}, 64),
    "EfficientViT large": (
        "efficientvit_l1",
        {"widths": [8, 8, 12, 16, 32], "depths": [1, 1, 1, 2, 2], "head_widths": [16, 24]},
        64,
    ),
    "EfficientViT MSRA": (
        "efficientvit_m0",
        {"embed_dim": [16, 24, 32], "key_dim": [4, 4, 4], "num_heads": [2, 2, 2], "kernels": [5, 3]},
        64,
    ),
    "EfficientFormerV2": (
        "efficientformerv2_s0",
        {"embed_dims": [8, 12, 16, 24], "depths": [1, 2, 2, 2], "mlp_ratios": [[2], [2, 2], [2, 2], [2, 2]]},
        64,
    ),
}


@cache
def build_tiny(family: str) -> Backbone:
    """The family's smallest member for 5 classes, with weights that are all random: no block leaves its input as is."""
    name, arguments, image_size = TINY[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build_backbone(name, arguments=arguments, num_classes=5, image_size=image_size)
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return backbone.requires_grad_(False)
