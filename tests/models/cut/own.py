"""Small models of other people, as they would bring them: name, constructor, image size."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import dynexit
from dynexit.models.cut.backbone import OwnBackbone

NUM_CLASSES = 5


class Block(nn.Module):
    """A residual block whose skip adds in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(torch.relu(x)))
        y += x
        return y


class Residual(nn.Module):
    """A stem, residual blocks and a head."""

    def __init__(self, in_channels: int = 3, num_classes: int = NUM_CLASSES, num_blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, 2, 1)
        self.blocks = nn.ModuleList(Block(8) for _ in range(num_blocks))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x.mean((2, 3))))


def tied() -> nn.Module:
    """A block's weights are also another's."""
    model = Residual()
    model.blocks[2].conv.weight, model.blocks[2].norm = model.blocks[0].conv.weight, model.blocks[0].norm
    return model


def sequential() -> nn.Module:
    """Layers in a row, of which none repeats as a block."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 12, 3, 2), nn.ReLU(inplace=True), nn.Conv2d(12, 16, 3), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, NUM_CLASSES)),
    )


def resnet() -> nn.Module:
    basic = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(basic, [1, 1, 1, 1], num_classes=NUM_CLASSES, width_per_group=64)


def mobilenet() -> nn.Module:
    setting = torchvision.models.mobilenetv3.InvertedResidualConfig
    rows = [(8, 3, 16, 8, True, "RE", 1), (8, 3, 24, 16, False, "HS", 2), (16, 5, 32, 16, True, "HS", 1)]
    settings = [setting(*row, dilation=1, width_mult=1.0) for row in rows]
    return torchvision.models.MobileNetV3(settings, last_channel=32, num_classes=NUM_CLASSES)


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=NUM_CLASSES)


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer([2, 2], 8, [1, 2], [2, 2], [4, 4], num_classes=NUM_CLASSES)


def hugging_face_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=NUM_CLASSES))


def hugging_face_convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 12], depths=[1, 2], num_labels=NUM_CLASSES)
    return ConvNextForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Sequential": sequential,
    "Residual": Residual,
    "tied weights": tied,
    "ResNet": resnet,
    "DenseNet": lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=NUM_CLASSES),
    "MobileNetV3": mobilenet,
    "ViT": vit,
    "Swin": swin,
    "Hugging Face ViT": hugging_face_vit,
    "Hugging Face ConvNeXt": hugging_face_convnext,
}


@cache
def built(name: str) -> nn.Module:
    """The model in eval mode, with weights and statistics that leave nothing as it is."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    generator = torch.Generator().manual_seed(1)
    for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
        tensor.data += 0.1 * torch.rand(tensor.shape, generator=generator)
    return model.requires_grad_(False)


@cache
def cut(name: str) -> OwnBackbone:
    """The model, cut at the places that are taken by themselves; nobody may change it."""
    return dynexit.cut(built(name), images(1))


def images(num: int = 4, size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(num, channels, size, size, generator=torch.Generator().manual_seed(2))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """The model's own answer."""
    with torch.no_grad():
        answer: Any = model(x)
    found: Tensor = answer if isinstance(answer, Tensor) else answer.logits
    return found
