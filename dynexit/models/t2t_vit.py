"""T2T-ViT (Yuan et al., "Tokens-to-Token ViT", ICCV 2021), with the parameter names of its published weights.

The image is unfolded three times into overlapping patches; between the unfoldings a small attention layer mixes the
patches: a performer (linear attention), or a transformer layer in the `t_` variants. A plain ViT follows.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, linear, scaled_dot_product_attention, unfold

# width, depth, heads, MLP ratio
_SIZES = {
    "7": (256, 7, 4, 2.0),
    "10": (256, 10, 4, 2.0),
    "12": (256, 12, 4, 2.0),
    "14": (384, 14, 6, 3.0),
    "19": (448, 19, 7, 3.0),
    "24": (512, 24, 8, 3.0),
}

VARIANTS: dict[str, dict[str, Any]] = {
    f"t2t_vit_{prefix}{name}": {
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": ratio,
        "stem": stem,
    }
    for prefix, stem, names in (("", "performer", _SIZES), ("t_", "transformer", ("14", "19", "24")))
    for name, (width, depth, heads, ratio) in ((name, _SIZES[name]) for name in names)
}


class Performer(nn.Module):
    """Linear attention with positive random features (the paper's appendix; Choromanski et al. 2021), one head."""

    w: Tensor

    def __init__(self, num_inputs: int, num_outputs: int, dropout: float = 0.1) -> None:
        super().__init__()
        num_random = num_outputs // 2
        self.norm1 = nn.LayerNorm(num_inputs)
        self.kqv = nn.Linear(num_inputs, 3 * num_outputs)
        self.proj = nn.Linear(num_outputs, num_outputs)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(num_outputs)
        self.mlp = nn.Sequential(
            nn.Linear(num_outputs, num_outputs), nn.GELU(), nn.Linear(num_outputs, num_outputs), nn.Dropout(dropout)
        )
        # fixed, so a buffer: never trained, but part of the weights
        self.register_buffer("w", nn.init.orthogonal_(torch.empty(num_random, num_outputs)) * math.sqrt(num_random))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, num_outputs) from (B, T, num_inputs)."""
        x = self._attend(self.norm1(x))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed

    def _attend(self, x: Tensor) -> Tensor:
        key, query, value = self.kqv(x).chunk(3, dim=-1)
        device_type = "cpu" if x.is_meta else x.device.type
        with torch.autocast(device_type, enabled=False):  # exp of half-precision numbers overflows
            key, query = self._random_features(key), self._random_features(query)
            key_value = key.transpose(1, 2) @ value.to(key.dtype)
            total = query @ key.sum(dim=1).unsqueeze(2)
            y = query @ key_value / (total + 1e-8)
        mixed: Tensor = value + self.dropout(self.proj(y.to(value.dtype)))
        return mixed

    def _random_features(self, x: Tensor) -> Tensor:
        x = x.to(self.w.dtype)
        squared_norm = (x * x).sum(dim=-1, keepdim=True)
        return torch.exp(linear(x, self.w) - squared_norm / 2) / math.sqrt(len(self.w))


class _ValueAttention(nn.Module):
    """Attention with one head that changes the width, so its residual comes from the values."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.scale = num_inputs**-0.5
        self.qkv = nn.Linear(num_inputs, 3 * num_outputs, bias=False)
        self.proj = nn.Linear(num_outputs, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        y = scaled_dot_product_attention(query, key, value, scale=self.scale)
        mixed: Tensor = (value + self.proj(y)).squeeze(1)
        return mixed


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(gelu(self.fc1(x)))
        return y


class TokenTransformer(nn.Module):
    """The transformer layer between unfoldings in the `t_` variants."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(num_inputs)
        self.attn = _ValueAttention(num_inputs, num_outputs)
        self.norm2 = nn.LayerNorm(num_outputs)
        self.mlp = _Mlp(num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, num_outputs) from (B, T, num_inputs)."""
        x = self.attn(self.norm1(x))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class TokensToToken(nn.Module):
    """Three overlapping unfoldings with attention between them: tokens (B, T, embed_dim) from images (B, C, H, W)."""

    def __init__(self, in_channels: int, embed_dim: int, stem: str, token_dim: int) -> None:
        super().__init__()
        layer = {"performer": Performer, "transformer": TokenTransformer}[stem]
        self.attention1 = layer(in_channels * 7 * 7, token_dim)
        self.attention2 = layer(token_dim * 3 * 3, token_dim)
        self.project = nn.Linear(token_dim * 3 * 3, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = _first_grid(x.shape[2:])
        tokens = unfold(x, 7, stride=4, padding=2).transpose(1, 2)
        for attention in (self.attention1, self.attention2):
            image = attention(tokens).transpose(1, 2).unflatten(2, grid)
            tokens = unfold(image, 3, stride=2, padding=1).transpose(1, 2)
            grid = _halved(grid)
        projected: Tensor = self.project(tokens)
        return projected


class T2TViT(nn.Module):
    """Logits (B, K) from images (B, C, H, W) of a fixed size in pixels (side, or height and width)."""

    pos_embed: Tensor

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        stem: str = "performer",
        token_dim: int = 64,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        img_size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.default_cfg = {"input_size": (in_chans, *img_size), "classifier": "head"}
        self.grid = _halved(_halved(_first_grid(img_size)))
        self.tokens_to_token = TokensToToken(in_chans, embed_dim, stem, token_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("pos_embed", sinusoid(1 + self.grid[0] * self.grid[1], embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, drop_path=rate, norm_layer=nn.LayerNorm)
            for rate in torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + T, D), the class token first, with their positions."""
        tokens = self.tokens_to_token(x)
        return torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1) + self.pos_embed

    def feature(self, tokens: Tensor) -> Tensor:
        """The class token (B, D) through the final norm."""
        feature: Tensor = self.norm(tokens[:, 0])
        return feature

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Logits (B, K) from the tokens after the last block."""
        logits: Tensor = self.head(self.feature(tokens))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        for block in self.blocks:
            tokens = block(tokens)
        return self.forward_head(tokens)


def sinusoid(num_positions: int, width: int) -> Tensor:
    """The fixed position embedding (1, num_positions, width) of the published models: sines even, cosines odd."""
    position = torch.arange(num_positions, dtype=torch.float64)[:, None]
    pair = torch.arange(width, dtype=torch.float64) // 2
    angle = position / 10000 ** (2 * pair / width)
    table = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())
    return table[None].to(torch.get_default_dtype())


def resize_positions(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """A square grid's position embedding (1, 1 + n², D) for another grid (bicubic); the class token's row stays.

    Returned as it is where it is no such embedding.
    """
    if not pos_embed.is_floating_point() or pos_embed.dim() != 3 or pos_embed.shape[1] < 2:
        return pos_embed
    side = math.isqrt(pos_embed.shape[1] - 1)
    if grid == (side, side) or pos_embed.shape[1] != 1 + side * side:
        return pos_embed
    image = pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = interpolate(image, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def _first_grid(size: Sequence[int]) -> tuple[int, int]:
    return (size[0] - 3) // 4 + 1, (size[1] - 3) // 4 + 1


def _halved(grid: tuple[int, int]) -> tuple[int, int]:
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2
