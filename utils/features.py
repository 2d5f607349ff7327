"""Backbone features of a list of pictures. The backbone is frozen and nothing is augmented: computed once."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor, nn
from tqdm import tqdm

from datasets.mvtec import read_batches

CACHING_BATCH = 8  # pictures a pass; the result does not depend on it


class FeatureCache:
    """The backbone's feature maps of pictures, one (N, C, h, w) float32 array per scale, in main memory."""

    def __init__(self, backbone: nn.Layer, paths: Sequence[Path], input_size: int, description: str) -> None:
        """Read the pictures and run the backbone once.

        Raises:
            UserError: a picture cannot be read.
        """
        self.maps: list[np.ndarray] = []
        self._count = len(paths)
        start = 0
        with tqdm(total=len(paths), desc=description, unit="image", disable=None, leave=False) as bar:
            for images in read_batches(paths, CACHING_BATCH, input_size):
                features = [x.numpy() for x in backbone(paddle.to_tensor(images))]
                if not self.maps:
                    self.maps = [np.empty((len(paths), *x.shape[1:]), np.float32) for x in features]
                for whole, part in zip(self.maps, features, strict=True):
                    whole[start : start + len(part)] = part
                start += len(images)
                bar.update(len(images))

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: np.ndarray) -> list[Tensor]:
        """Features of these pictures, (B, C, h, w) per scale, on the device."""
        return [paddle.to_tensor(maps[indices]) for maps in self.maps]
