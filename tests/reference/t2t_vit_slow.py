"""T2T-ViT from its weights by loops over patches and tokens, in numpy: slow, and written from the paper's formulas."""

from math import erf

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def logits(weights: dict[str, Array], image: Array, num_heads: int) -> Array:
    """Logits (K,) for one image (C, H, W)."""
    tokens, rows, columns = unfold(image, size=7, stride=4, padding=2)
    for name in ("tokens_to_token.attention1.", "tokens_to_token.attention2."):
        part = {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}
        mixed = performer(part, tokens) if "w" in part else token_transformer(part, tokens)
        tokens, rows, columns = unfold(mixed.T.reshape(-1, rows, columns), size=3, stride=2, padding=1)
    x = linear(weights, "tokens_to_token.project", tokens)
    x = np.concatenate([weights["cls_token"][0], x]) + weights["pos_embed"][0]
    block = 0
    while f"blocks.{block}.norm1.weight" in weights:
        name = f"blocks.{block}."
        x = vit_block(
            {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}, x, num_heads
        )
        block += 1
    return linear(weights, "head", norm(weights, "norm", x)[0])


def unfold(image: Array, size: int, stride: int, padding: int) -> tuple[Array, int, int]:
    """(patches (rows·columns, C·size²), rows, columns), channel first inside a patch."""
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * padding, width + 2 * padding))
    padded[:, padding : padding + height, padding : padding + width] = image
    tops = range(0, height + 2 * padding - size + 1, stride)
    lefts = range(0, width + 2 * padding - size + 1, stride)
    patches = [padded[:, top : top + size, left : left + size].reshape(-1) for top in tops for left in lefts]
    return np.array(patches), len(tops), len(lefts)


def performer(weights: dict[str, Array], x: Array) -> Array:
    """Attention whose kernel is the mean over m random directions of exp(w·q − |q|²/2) exp(w·k − |k|²/2)."""
    key, query, value = np.split(linear(weights, "kqv", norm(weights, "norm1", x)), 3, axis=1)
    directions = weights["w"]
    attended = np.zeros_like(value)
    for t in range(len(x)):
        kernel = np.zeros(len(x))
        for s in range(len(x)):
            for w in directions:
                kernel[s] += phi(w, query[t]) * phi(w, key[s]) / len(directions)
        attended[t] = sum(kernel[s] * value[s] for s in range(len(x))) / (kernel.sum() + 1e-8)
    x = value + linear(weights, "proj", attended)
    return x + linear(weights, "mlp.2", gelu(linear(weights, "mlp.0", norm(weights, "norm2", x))))


def phi(w: Array, x: Array) -> float:
    return float(np.exp(w @ x - x @ x / 2))


def token_transformer(weights: dict[str, Array], x: Array) -> Array:
    """One-head attention whose residual comes from the values; its scale is the width of its input."""
    query, key, value = np.split(linear(weights, "attn.qkv", norm(weights, "norm1", x)), 3, axis=1)
    x = value + linear(weights, "attn.proj", attention(query, key, value, x.shape[1] ** -0.5))
    return x + mlp(weights, norm(weights, "norm2", x))


def vit_block(weights: dict[str, Array], x: Array, num_heads: int) -> Array:
    queries, keys, values = np.split(linear(weights, "attn.qkv", norm(weights, "norm1", x)), 3, axis=1)
    heads = zip(*(np.split(part, num_heads, axis=1) for part in (queries, keys, values)), strict=True)
    scale = (x.shape[1] // num_heads) ** -0.5
    mixed = np.concatenate([attention(query, key, value, scale) for query, key, value in heads], axis=1)
    x = x + linear(weights, "attn.proj", mixed)
    return x + mlp(weights, norm(weights, "norm2", x))


def attention(query: Array, key: Array, value: Array, scale: float) -> Array:
    out = np.zeros_like(value)
    for t in range(len(query)):
        score = np.exp(key @ query[t] * scale)
        out[t] = score @ value / score.sum()
    return out


def mlp(weights: dict[str, Array], x: Array) -> Array:
    return linear(weights, "mlp.fc2", gelu(linear(weights, "mlp.fc1", x)))


def linear(weights: dict[str, Array], name: str, x: Array) -> Array:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def norm(weights: dict[str, Array], name: str, x: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return centred / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Array) -> Array:
    return x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2
