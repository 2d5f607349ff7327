"""Figures that no window shows, written whole."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.common.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import, and needed when there is something to draw


def blank_figure(width: float, height: float) -> "Figure":
    """A figure of this many inches."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.WARNING)  # its first run tells of its font cache
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def drawable(text: str) -> bool:
    """Whether the font of the figures has all its characters; the others become boxes, with a warning for each."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return all(map(get_font(findfont(FontProperties())).get_char_index, map(ord, text)))


def write_figure(path: Path, figure: "Figure") -> None:
    """Write it with 100 dots an inch in the format of the file's suffix.

    Raises:
        UserError: it cannot be written.
    """
    write_whole(path, lambda name: figure.savefig(name, dpi=100))
