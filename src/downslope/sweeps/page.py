"""A sweep's page: one file that opens from disk, with everything in it."""

import base64
import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downslope.pictures.style import DARK, LIGHT
from downslope.runs.whole_files import whole_file
from downslope.sweeps.picture import MOST_PANELS, draw_curves, draw_learning_rate, suggested_rate
from downslope.sweeps.table import Job, row, varied_keys

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = ("job", "error")


def write_page(jobs: Sequence[Job], file: Path, title: str, picture: Path) -> None:
    """Writes `report.html`: pictures for light and dark, and a row a job with the command that runs it again.

    Args:
        jobs: The best first.
        file: Where to.
        title: The sweep's name.
        picture: `draw_learning_rate` on light paper, as saved.
    """
    from jinja2 import Environment, PackageLoader

    keys = varied_keys(jobs)
    rows = [(job, row(job, keys)) for job in jobs]
    columns = [name for name in rows[0][1] if any(cells[name] not in (None, "") for _, cells in rows)]
    page = Environment(loader=PackageLoader("downslope.sweeps", "."), autoescape=True).get_template("page.html")
    html = page.render(
        title=title,
        jobs=jobs,
        counts=Counter(job.status for job in jobs),
        best=jobs[0] if math.isfinite(jobs[0].objective) else None,
        suggested=suggested_rate(jobs),
        pictures=_pictures(jobs, picture),
        most_panels=MOST_PANELS,
        columns=columns,
        rows=[(job, [_cell(name, cells[name]) for name in columns]) for job, cells in rows],
    )
    with whole_file(file) as stream:
        stream.write(html.encode())


def _pictures(jobs: Sequence[Job], picture: Path) -> list[tuple[str, str, str, str]]:
    """Title, description, and the picture for light and for dark surroundings."""
    rate, curves = "validation loss against the learning rate", "loss and gradient norm against steps, a column a job"
    light, dark = picture.read_bytes(), _png(draw_learning_rate(jobs, DARK))
    pictures = [("Learning rate", rate, _data_uri(light), _data_uri(dark))]
    figures = [figure for theme in (LIGHT, DARK) if (figure := draw_curves(jobs, theme))]
    if figures:
        light, dark = map(_png, figures)
        pictures.append(("Curves", curves, _data_uri(light), _data_uri(dark)))
    return pictures


def _png(figure: "Figure") -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _cell(name: str, value: Any) -> tuple[Any, str, str]:
    """What a cell sorts by, what it shows, and its kind."""
    if value is None:
        return "", "", ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    try:
        return float(value), text, "number"
    except ValueError:
        return value, text, "words" if name in WORDS else text if name == "status" else ""
