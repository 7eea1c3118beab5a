"""Figures on their way to a file: their text as it is, whatever it holds, and never at the price of a result."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hardpatch.runtime.errors import Interrupted
from hardpatch.runtime.files import write_atomically
from hardpatch.runtime.log import warn
from hardpatch.runtime.outputs import note_output
from hardpatch.runtime.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def as_png(figure: Figure, *, dpi: int = 110) -> bytes:
    """A figure as a PNG; ``$`` starts no formula, and characters that cannot be shown are escaped."""
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    for axis in figure.findobj(Axis):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        if any(label != printable(label) for label in labels):
            axis.set_ticklabels([printable(label) for label in labels])
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(printable(text.get_text(), lines=True))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for it
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def write_picture(figure: Figure, path: Path, *, dpi: int = 110, source: str = "") -> None:
    """Write a PNG that is either whole or not there, and that is no image of any source; its folder is made.

    Args:
        figure: What to write.
        path: The file.
        dpi: Dots per inch.
        source: The images that it shows, if any.

    Raises:
        OSError: Writing failed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = as_png(figure, dpi=dpi)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    note_output(path, source=source)


def try_picture(draw: Callable[[], Figure], path: Path, *, dpi: int = 110, source: str = "") -> bool:
    """Draw and write a picture that comes beside results: what fails is said, and costs nothing else.

    Returns:
        Is it there?
    """
    try:
        write_picture(draw(), path, dpi=dpi, source=source)
    except Interrupted:
        raise
    except Exception as error:  # whatever the libraries that draw may raise
        warn(f"the picture {path} could not be made, the results are whole: {type(error).__name__}: {error}")
        return False
    return True
