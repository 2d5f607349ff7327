"""Train ResNet18 up to layer3 to name what drawn pictures show."""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from deploy.cli import UserError
from deploy.files import write_whole
from deploy.imaging import normalise
from models.offline_weights.outlines import OUTLINES
from models.offline_weights.pictures import Artist, Batch
from models.offline_weights.textures import TEXTURES
from utils.checkpoint import save_checkpoint
from utils.pickles import load_pickle
from utils.states import set_state

STRIDES = (4, 8, 16)  # of layer1, layer2, layer3
CHANNELS = (64, 128, 256)
PLACES = 4  # along each side of a cell, at which its names are read
NAMES = (len(TEXTURES), len(OUTLINES) + 1)


@dataclass(frozen=True)
class Settings:
    """What decides the result. A training resumes under the same settings only."""

    steps: int
    batch_size: int
    size: int  # of the pictures, pixels; a multiple of 16
    lr: float  # the highest
    weight_decay: float
    seed: int

    def lr_at(self, step: int) -> float:
        """Rises over the first 4 % of the steps, then falls as a half cosine to 0; `step` counts from 0."""
        warm = max(self.steps // 25, 1)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(self.steps - warm, 1)))


class Namer(nn.Layer):
    """ResNet18 up to layer3; at every position of layers 1, 2 and 3 a linear map gives the logits of the names."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = paddle.vision.models.resnet18(pretrained=False)
        del self.backbone.layer4, self.backbone.avgpool, self.backbone.fc
        # from zero: random logits would first teach the features to be constant, which lowers the loss soonest
        zero = nn.initializer.Constant(0.0)
        self.heads = nn.LayerList([nn.Conv2D(channels, sum(NAMES), 1, weight_attr=zero) for channels in CHANNELS])
        for name, parameter in self.named_parameters():
            parameter.name = name  # the optimizer's state is stored under these names

    def forward(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, 3, S, S) -> per layer the logits of textures (B, NAMES[0], s, s) and outlines (B, NAMES[1], s, s)."""
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        logits = []
        for layer, head in zip((net.layer1, net.layer2, net.layer3), self.heads, strict=True):
            x = layer(x)
            logits.append(tuple(head(x).split(list(NAMES), axis=1)))
        return logits


def parts_of_cells(names: np.ndarray, stride: int, count: int) -> np.ndarray:
    """Which part of each cell of a feature map has which name: (B, S, S) -> (B, s, s, count) float32, s = S / stride.

    The names are read at 4 x 4 places of a cell.
    """
    step = stride // PLACES
    read = names[:, step // 2 :: step, step // 2 :: step].astype(np.int64)  # (B, 4 s, 4 s)
    b, side = len(names), names.shape[1] // stride
    cell = np.arange(b * side * side).reshape(b, side, side).repeat(PLACES, axis=1).repeat(PLACES, axis=2)
    counts = np.bincount((cell * count + read).ravel(), minlength=b * side * side * count)
    return counts.reshape(b, side, side, count).astype(np.float32) / PLACES**2


def naming_loss(logits: Tensor, parts: np.ndarray) -> tuple[Tensor, float]:
    """Cross-entropy with the parts of the cells: the mean over cells of -sum_k parts_k log softmax(logits)_k.

    Args:
        logits: (B, K, s, s).
        parts: (B, s, s, K), of sum 1 over K.

    Returns:
        the loss, and the accuracy: the mean part of the name that is the likeliest of its cell.
    """
    logits = logits.transpose([0, 2, 3, 1]).flatten(0, 2)  # (B s s, K)
    parts = parts.reshape(-1, parts.shape[-1])
    loss = F.cross_entropy(logits, paddle.to_tensor(parts), soft_label=True)
    likeliest = logits.numpy().argmax(axis=1)
    return loss, float(parts[np.arange(len(parts)), likeliest].mean())


def training_step(model: Namer, optimizer: paddle.optimizer.Optimizer, batch: Batch) -> tuple[float, list[float]]:
    """Change the parameters once.

    Returns:
        the mean loss of a layer (textures plus outlines), and the accuracies: textures and outlines at layers 1, 2, 3.
    """
    losses, accuracies = [], []
    logits = model(paddle.to_tensor(normalise(batch.pictures)))
    for stride, pair in zip(STRIDES, logits, strict=True):
        for part, names, count in zip(pair, (batch.textures, batch.outlines), NAMES, strict=True):
            loss, right = naming_loss(part, parts_of_cells(names, stride, count))
            losses.append(loss)
            accuracies.append(right)
    total = paddle.add_n(losses) / len(STRIDES)
    total.backward()
    optimizer.step()
    optimizer.clear_grad()
    return total.item(), accuracies


class Training:
    """A training from its first or any later step; `state` and `restore` hold all that the rest depends on."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.step = 0  # steps done
        paddle.seed(settings.seed)
        self.model = Namer()
        self.model.train()
        kernels = {parameter.name for parameter in self.model.parameters() if parameter.ndim == 4}
        self._optimizer = paddle.optimizer.AdamW(
            settings.lr,
            parameters=self.model.parameters(),
            weight_decay=settings.weight_decay,
            apply_decay_param_fun=kernels.__contains__,  # BatchNorms and biases do not decay
        )
        self._artist = Artist(settings.seed, settings.size)
        self._studio = ThreadPoolExecutor(1)  # draws the next batch while this one is learnt
        self._next: Future[Batch] | None = None

    def advance(self) -> tuple[float, list[float]]:
        """One step; returns what `training_step` does."""
        batch = (self._next or self._order(self.step)).result()
        self._next = self._order(self.step + 1)
        self._optimizer.set_lr(self.settings.lr_at(self.step))
        self.step += 1
        # the optimizer names its state in the first step, else with a count of all optimizers of this process
        with paddle.utils.unique_name.guard():
            return training_step(self.model, self._optimizer, batch)

    def _order(self, number: int) -> Future[Batch]:
        return self._studio.submit(self._artist.batch, number, self.settings.batch_size)

    def state(self) -> dict[str, Any]:
        """For `save_checkpoint`."""
        return {
            "step": self.step,
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def restore(self, path: Path) -> None:
        """Go on from a state that `save_checkpoint` wrote.

        Raises:
            UserError: missing, damaged, not such a state, or made under other settings.
        """
        state = load_pickle(path)
        if not isinstance(state, dict) or state.keys() != {"step", "settings", "model", "optimizer"}:
            raise UserError(f"{path}: not the state of a training of the offline weights")
        for name, value in asdict(self.settings).items():
            if (stored := state["settings"].get(name)) != value:
                raise UserError(f"{path}: was made with {name} {stored}, not {value}; give the same or start anew")
        set_state(self.model, state["model"], str(path))
        self._optimizer.set_state_dict(state["optimizer"])
        self.step, self._next = state["step"], None


def save_state(training: Training, path: Path) -> None:
    """Write the whole state of the training."""
    save_checkpoint(path, training.state())


def write_weights(backbone: nn.Layer, path: Path) -> None:
    """Write an .npz with Paddle's names: convolutions in float16, BatchNorms, which are small, in float32."""
    arrays = {
        name: value.numpy().astype(np.float16 if len(value.shape) == 4 else np.float32)
        for name, value in backbone.state_dict().items()
    }
    write_whole(path, lambda name: np.savez_compressed(name, **arrays))
