"""T2T-ViT: the published models' shapes, and their mathematics by a slow reference."""

import math

import numpy as np
import pytest
import torch

from dynexit.models.t2t_vit import VARIANTS, Performer, T2TViT, resize_positions, sinusoid
from tests.reference import t2t_vit_slow


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("t2t_vit_7", 4.26),
        ("t2t_vit_10", 5.83),
        ("t2t_vit_12", 6.89),
        ("t2t_vit_14", 21.47),
        ("t2t_vit_19", 39.09),
        ("t2t_vit_24", 64.00),
        ("t2t_vit_t_14", 21.47),
        ("t2t_vit_t_19", 39.08),
        ("t2t_vit_t_24", 64.00),
    ],
)
def test_trainable_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = T2TViT(**VARIANTS[name])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def published_shapes(width: int, ratio: int, num_blocks: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes in the published files of the performer variants."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width), "pos_embed": (1, 197, width)}
    for name, inputs in (("tokens_to_token.attention1", 147), ("tokens_to_token.attention2", 576)):
        shapes[f"{name}.w"] = (32, 64)
        linears = {"kqv": (192, inputs), "proj": (64, 64), "mlp.0": (64, 64), "mlp.2": (64, 64)}
        norms = {"norm1": inputs, "norm2": 64}
        shapes |= {f"{name}.{key}.weight": shape for key, shape in linears.items()}
        shapes |= {f"{name}.{key}.bias": shape[:1] for key, shape in linears.items()}
        shapes |= {f"{name}.{key}.{kind}": (n,) for key, n in norms.items() for kind in ("weight", "bias")}
    linears = {"tokens_to_token.project": (width, 576), "head": (1000, width)}
    for i in range(num_blocks):
        shapes[f"blocks.{i}.attn.qkv.weight"] = (3 * width, width)
        shapes |= {f"blocks.{i}.{norm}.{kind}": (width,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        linears[f"blocks.{i}.attn.proj"] = (width, width)
        linears[f"blocks.{i}.mlp.fc1"] = (ratio * width, width)
        linears[f"blocks.{i}.mlp.fc2"] = (width, ratio * width)
    shapes |= {f"{key}.weight": shape for key, shape in linears.items()}
    shapes |= {f"{key}.bias": shape[:1] for key, shape in linears.items()}
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


@pytest.mark.parametrize(("name", "size"), [("t2t_vit_7", (256, 2, 7)), ("t2t_vit_14", (384, 3, 14))])
def test_names_and_shapes_of_the_published_weights(name: str, size: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = T2TViT(**VARIANTS[name])
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == published_shapes(*size)


def test_names_of_the_transformer_stem() -> None:
    with torch.device("meta"):
        state = T2TViT(**VARIANTS["t2t_vit_t_14"]).state_dict()
    found = {
        k.removeprefix("tokens_to_token.attention2."): tuple(v.shape) for k, v in state.items() if "attention2" in k
    }
    assert found == {
        "norm1.weight": (576,),
        "norm1.bias": (576,),
        "attn.qkv.weight": (192, 576),
        "attn.proj.weight": (64, 64),
        "attn.proj.bias": (64,),
        "norm2.weight": (64,),
        "norm2.bias": (64,),
        "mlp.fc1.weight": (64, 64),
        "mlp.fc1.bias": (64,),
        "mlp.fc2.weight": (64, 64),
        "mlp.fc2.bias": (64,),
    }


@torch.no_grad()
@pytest.mark.parametrize("stem", ["performer", "transformer"])
def test_logits_equal_the_slow_reference(stem: str) -> None:
    torch.manual_seed(0)
    model = T2TViT(
        img_size=(20, 33),
        in_chans=2,
        num_classes=3,
        embed_dim=12,
        depth=2,
        num_heads=3,
        mlp_ratio=2,
        stem=stem,
        token_dim=6,
    )
    model = model.double().eval()
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    images = torch.randn(2, 2, 20, 33, dtype=torch.float64)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    expected = np.stack([t2t_vit_slow.logits(weights, image.numpy(), num_heads=3) for image in images])
    np.testing.assert_allclose(model(images).numpy(), expected, rtol=1e-9, atol=1e-9)


def test_the_position_embedding_is_the_published_formula() -> None:
    table = sinusoid(5, 6)
    assert table.shape == (1, 5, 6)
    for position in range(5):
        for j in range(6):
            angle = position / 10000 ** (2 * (j // 2) / 6)
            assert table[0, position, j] == pytest.approx(math.sin(angle) if j % 2 == 0 else math.cos(angle), abs=1e-6)


def test_positions_are_resized_but_for_the_class_token() -> None:
    embedding = torch.randn(1, 1 + 14 * 14, 8, generator=torch.Generator().manual_seed(0))
    assert resize_positions(embedding, (14, 14)) is embedding
    small = resize_positions(embedding, (2, 3))
    assert small.shape == (1, 7, 8)
    assert torch.equal(small[:, 0], embedding[:, 0])
    ramp = torch.arange(14.0).repeat(14)[None, :, None]  # grows along the columns
    ramp = torch.cat([torch.zeros(1, 1, 1), ramp], dim=1)
    resized = resize_positions(ramp, (7, 28))[0, 1:, 0].view(7, 28)
    assert torch.allclose(resized, resized[:1].expand(7, 28), atol=1e-5)
    not_square = torch.zeros(1, 1 + 6, 8)
    assert resize_positions(not_square, (3, 3)) is not_square
    assert resized[0, 4:24].diff().allclose(torch.tensor(0.5), atol=0.1)


def test_what_is_fixed_is_not_trained_but_saved() -> None:
    model = T2TViT(depth=1, embed_dim=8, num_heads=1, token_dim=4)
    names = dict(model.named_parameters()).keys()
    fixed = {"pos_embed", "tokens_to_token.attention1.w", "tokens_to_token.attention2.w"}
    assert model.state_dict().keys() - names == fixed
    performer = Performer(7, 8)
    assert torch.allclose(performer.w @ performer.w.T, 4 * torch.eye(4), atol=1e-5)


@torch.no_grad()
def test_the_performer_stays_finite_in_half_precision() -> None:
    performer = Performer(16, 8).eval()
    x = torch.randn(2, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = performer(x)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y.float(), performer(x), rtol=0.1, atol=0.1)
