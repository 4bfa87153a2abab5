"""What a token loss does to a student that is too simple for its teacher: `python docs/figures/make_figures.py`.

The vocabulary is a line of V points. The teacher has two bumps, the student one, with a position m and a width s:
logits -(x - m)²/(2 s²). Every installed token loss of this distribution that reads nothing but logits is drawn, under
its default settings. Needs matplotlib (the extra `docs`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dpkd.api import Family, LossSpec, Signal, TokenInputs
from dpkd.plugins import load_registry

FOLDER = Path(__file__).parent
X_V = torch.linspace(-6, 6, 121, dtype=torch.float64)
MIDDLE_M, WIDTH_S = (torch.linspace(*ends, n, dtype=torch.float64) for *ends, n in ((-4, 4, 65), (0.4, 3.4, 49)))
SLICE_WIDTH = 0.9
VALUE, SLOPE, TEACHER, STUDENT = "#1f5fa8", "#c4511d", "#9aa0a6", "#1f5fa8"
COLUMNS = 5


def teacher_logits() -> Tensor:
    """Log-probs `[V]` of two bumps: a tall one on the left, a wide one on the right."""
    bumps = 0.6 * torch.exp(-((X_V + 2) ** 2) / (2 * 0.6**2)) / 0.6
    bumps = bumps + 0.4 * torch.exp(-((X_V - 2.2) ** 2) / (2 * 0.9**2)) / 0.9
    return (bumps / bumps.sum()).log()


def student_logits(m_N: Tensor, s_N: Tensor) -> Tensor:
    """Logits `[N, V]` of one bump."""
    return -((X_V - m_N[:, None]) ** 2) / (2 * s_N[:, None] ** 2)


@dataclass(frozen=True)
class Drawn:
    """A loss over the student's position and width: values and slopes `[S, M]`, and where descent ends."""

    name: str
    values: Tensor
    slope_m: Tensor
    slope_s: Tensor
    end: tuple[float, float]


def drawable() -> list[LossSpec]:
    """Token losses that read logits only, by name."""
    logits = {Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}
    found = [
        loss.spec
        for loss in load_registry({}).losses.values()
        if loss.distribution == "dpkd" and loss.spec.family is Family.TOKEN and loss.spec.signals() == logits
    ]
    return sorted(found, key=lambda spec: spec.name)


def evaluate(spec: LossSpec, m_N: Tensor, s_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values and their slopes along m and along s, as autograd gives them to training, all `[N]`."""
    m_N, s_N = m_N.clone().requires_grad_(), s_N.clone().requires_grad_()
    signals = {
        Signal.STUDENT_LOGITS: student_logits(m_N, s_N),
        Signal.TEACHER_LOGITS: teacher_logits().expand(len(m_N), -1),
    }
    loss = spec.loss(spec.config())
    values_N = loss(TokenInputs(signals))
    slope_m, slope_s = torch.autograd.grad(values_N.sum(), (m_N, s_N))
    return values_N.detach(), slope_m, slope_s


def descend(spec: LossSpec, start: tuple[float, float], steps: int = 800) -> tuple[float, float]:
    """Where gradient descent from m and s ends, within the figure."""
    m, log_s = (torch.nn.Parameter(torch.full((1,), number, dtype=X_V.dtype)) for number in (start[0], log(start[1])))
    optimizer = torch.optim.Adam([m, log_s], lr=0.02)
    for _ in range(steps):
        s = log_s.detach().exp()
        _, slope_m, slope_s = evaluate(spec, m.detach(), s)
        m.grad, log_s.grad = slope_m, slope_s * s
        optimizer.step()
        with torch.no_grad():
            m.clamp_(MIDDLE_M[0], MIDDLE_M[-1])
            log_s.clamp_(WIDTH_S[0].log(), WIDTH_S[-1].log())
    return m.item(), log_s.exp().item()


def draw(spec: LossSpec) -> Drawn:
    """Everything that the figures show of a loss; descent starts at the lowest value of the grid."""
    s_SM, m_SM = torch.meshgrid(WIDTH_S, MIDDLE_M, indexing="ij")
    values, *slopes = (part.view(s_SM.shape) for part in evaluate(spec, m_SM.flatten(), s_SM.flatten()))
    lowest = int(values.argmin())
    start = m_SM.flatten()[lowest].item(), s_SM.flatten()[lowest].item()
    return Drawn(spec.name, values, *slopes, descend(spec, start))


def panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A grid of small axes; those that are not needed are hidden."""
    rows = -(-count // COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(10, height * rows), sharex=True, layout="constrained", squeeze=False
    )
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.set_visible(False)
    for axis in flat:
        axis.tick_params(labelsize=7)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return figure, flat


def landscape(drawn: list[Drawn]) -> Figure:
    """Values over m and s, arrows down the gradient, a cross where descent ends."""
    figure, axes = panels(len(drawn), 1.75)
    for axis, one in zip(axes, drawn, strict=False):
        high = torch.quantile(one.values[one.values.isfinite()], 0.85).item()
        low = one.values.min().item()
        axis.contourf(MIDDLE_M, WIDTH_S, one.values.clamp(max=high), levels=14, cmap="viridis_r", vmin=low, vmax=high)
        size = (one.slope_m**2 + one.slope_s**2).sqrt().clamp(min=1e-9)
        u, v = ((-slope / size)[3::9, 3::9] for slope in (one.slope_m, one.slope_s))
        axis.quiver(MIDDLE_M[3::9], WIDTH_S[3::9], u, v, color="black", alpha=0.45, scale=18, width=0.006)
        axis.plot(*one.end, "X", color="white", markeredgecolor="black", markersize=8, clip_on=False, zorder=5)
        axis.set_title(one.name, fontsize=9)
        axis.set_xlim(MIDDLE_M[0], MIDDLE_M[-1])
        axis.set_ylim(WIDTH_S[0], WIDTH_S[-1])
    figure.supxlabel("position m of the student", fontsize=9)
    figure.supylabel("width s", fontsize=9)
    return figure


def slices(drawn: list[Drawn]) -> Figure:
    """Value and slope along m at one width, over the teacher's bumps."""
    figure, axes = panels(len(drawn), 1.6)
    row = int((WIDTH_S - SLICE_WIDTH).abs().argmin())
    for axis, one in zip(axes, drawn, strict=False):
        value, slope = one.values[row], one.slope_m[row]
        p = teacher_logits().exp()
        low, high = min(value.min().item(), slope.min().item(), 0), max(value.max().item(), slope.max().item())
        axis.fill_between(X_V, low, low + p / p.max() * (high - low) * 0.5, color=TEACHER, alpha=0.35, linewidth=0)
        axis.plot(MIDDLE_M, value, color=VALUE, linewidth=1.4, label="value")
        axis.plot(MIDDLE_M, slope, color=SLOPE, linewidth=1.1, linestyle="--", label="slope along m")
        axis.axhline(0, color="black", linewidth=0.4)
        axis.set_title(one.name, fontsize=9)
        axis.set_xlim(-4, 4)
    axes[0].legend(fontsize=6, frameon=False, loc="upper center")
    figure.supxlabel(f"position m of a student of width {SLICE_WIDTH}; grey: the teacher", fontsize=9)
    return figure


def best(drawn: list[Drawn]) -> Figure:
    """The teacher, and the student where descent ends."""
    figure, axes = panels(len(drawn), 1.25)
    p = teacher_logits().exp()
    for axis, one in zip(axes, drawn, strict=False):
        m, s = (torch.tensor([number], dtype=torch.float64) for number in one.end)
        axis.fill_between(X_V, 0, p, color=TEACHER, alpha=0.5, linewidth=0)
        axis.plot(X_V, student_logits(m, s).softmax(-1)[0], color=STUDENT, linewidth=1.4)
        axis.set_ylim(0, 1.9 * p.max().item())
        axis.set_yticks([])
        axis.set_title(one.name, fontsize=9, pad=2)
    figure.supxlabel("grey: the teacher p; blue: the student q", fontsize=9)
    return figure


def save(figure: Figure, name: str) -> None:
    """Write a PNG of few colours, which keeps it small."""
    from PIL import Image

    path = FOLDER / f"{name}.png"
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
    with Image.open(path) as image:
        image.convert("RGB").quantize(48, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    torch.set_num_threads(1)
    drawn = [draw(spec) for spec in drawable()]
    for name, figure in (("landscape", landscape(drawn)), ("slices", slices(drawn)), ("best", best(drawn))):
        save(figure, name)


if __name__ == "__main__":
    main()
