"""The page of a search for a learning rate."""

import math
from pathlib import Path

import numpy as np

from shardlaunch.checkpoints.files import replace_file
from shardlaunch.launcher.commands.find_lr.curve import CurveRecord, Suggestion
from shardlaunch.launcher.commands.report.charts import Axis, short
from shardlaunch.launcher.commands.report.parts import grid, table
from shardlaunch.launcher.commands.sweep.plots import Point, axis_of, document, figure

PAGE = "find-lr.html"


def write_page(folder: Path, name: str, curve: CurveRecord, found: Suggestion) -> Path:
    """Write the page in a folder, and return where."""
    path = folder / PAGE
    x_axis = Axis(curve.lrs[0], curve.lrs[-1], *axis_of("x"), is_log=True)
    # What has diverged would leave no room for the rest.
    shown = [loss for loss in found.smooth if loss <= 2 * found.smooth[0]] if found.smooth else []
    top = max(shown, default=float("inf"))
    each = [(lr, loss) for lr, loss in zip(curve.lrs, curve.losses, strict=True) if loss <= top]
    mean = [(lr, loss) for lr, loss in zip(curve.lrs, found.smooth, strict=False) if loss <= top]
    points = []
    for lr, kind, about in (
        (found.lowest_lr, "c0 hollow", "lowest loss"),
        (found.steepest_lr, "c2", "falls fastest"),
        (found.lr, "c1", "suggested"),
    ):
        if lr is not None:
            loss = float(np.interp(math.log(lr), np.log(curve.lrs[: len(found.smooth)]), found.smooth))
            points.append(Point(x=lr, y=loss, kind=kind, about=f"{about}: lr {lr:.2g}, loss {loss:.4g}"))
    ticks = [(value, short(value)) for value in x_axis.ticks(6)]
    plot = figure(
        "loss by learning rate",
        "running mean, each step faint; log scale",
        points,
        x_axis=x_axis,
        x_ticks=ticks[:: max(1, len(ticks) // 7)],
        x_name="learning rate",
        lines=[("c0 faint", each), ("c0", mean)],
    )
    text = (
        f"Suggested: <b>--lr {found.lr:.2g}</b>. The loss falls fastest at {found.steepest_lr:.2g}, and is lowest at "
        f"{found.lowest_lr:.2g}."
        if found.lr is not None
        else "No suggestion: the loss does not fall."
    )
    rows = [
        [str(step + 1), f"{lr:.3e}", f"{loss:.5g}", f"{found.smooth[step]:.5g}" if step < len(found.smooth) else ""]
        for step, (lr, loss) in enumerate(zip(curve.lrs, curve.losses, strict=True))
    ]
    steps = table(("step", "lr", "loss", "running mean"), rows, numbers=(0, 1, 2, 3))
    body = f"<p>{text}</p>{grid([plot])}<details><summary>All steps</summary>{steps}</details>"
    replace_file(path, document(folder.name, f"Learning rate for {name}", body).encode())
    return path
