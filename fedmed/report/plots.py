"""The report's figures: inline SVG whose colours are CSS variables, so that they follow the page's theme."""

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmed.privacy.accounting import round_up

# Okabe and Ito's colour-blind-safe hues, darkened to stand out on white; the template has their counterparts
# on black. Markers tell the sites apart without colour.
INK, MUTED = "#1c2024", "#5b636b"
SERIES = ["#0072b2", "#c44e00", "#00805d", "#a8467f", "#946400", "#4b4bd0"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
DASHES = [(5, 3), (1, 2)]
STYLE: Any = {
    # Text stays text (searchable, in the page's font), and a site named $x$ is no formula.
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "fedmed",
    "font.size": 9,
    "axes.grid": True,
    "grid.color": MUTED,
    "grid.alpha": 0.25,
    "legend.frameon": False,
} | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
Entries = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Plot:
    """A figure: an `<svg>` element that refers to nothing outside, its title and its text alternative."""

    svg: str
    title: str
    alt: str
    wide: bool = False


def draw(summary: Mapping[str, Any], history: Entries, runs: Mapping[str, Any], *, claim: str) -> list[Plot]:
    """The figures of a run. `claim` stands beside epsilon; without one (NOT PRIVATE) no epsilon is drawn."""
    import matplotlib

    plots: list[Plot] = []
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The browser draws the text: a letter that Matplotlib's font lacks is no loss.
        warnings.filterwarnings("ignore", message="Glyph")
        if history:
            plots.append(_auc_per_round(history, runs, wide=bool(claim) == (len(runs) > 1)))
        if history and claim:
            plots.append(_epsilon_per_round(summary["privacy"], history, claim))
        if len(runs) > 1:
            plots.append(_auc_by_site(runs))
    return plots


def _auc_per_round(history: Entries, runs: Mapping[str, Any], *, wide: bool) -> Plot:
    sites = dict.fromkeys(site for entry in history for site in entry["site_metrics"])
    figure, axes = _canvas(9.6 if wide else 4.8, 3.3)
    names = _site_lines(axes, history, sites, lambda e, site: e["site_metrics"].get(site, {}).get("auc"))
    alt = f"Line chart of the exact AUC of {len(names)} sites and of all sites, by round"
    pooled = [(entry["round"], entry["auc"]) for entry in history if entry["auc"] is not None]
    if pooled:
        axes.plot(*zip(*pooled, strict=True), color=INK, linewidth=3, marker="o", markersize=4, zorder=3)
        names.append("federated, all sites")
        (first, low), (last, high) = pooled[0], pooled[-1]
        alt += f"; all sites: {low:.3f} in round {first}, {high:.3f} in round {last}"
    for (name, run), dashes in zip(list(runs.items())[1:], DASHES, strict=False):
        if run["auc"] is not None:
            axes.axhline(run["auc"], color=INK, linewidth=1.4, dashes=dashes)
            names.append(f"{name}, all sites")
            alt += f"; {name}: {run['auc']:.3f}"
    axes.set(xlabel="round", ylabel="AUC (0 to 1, exact)")
    axes.set_ylim(top=min(1.01, axes.get_ylim()[1]))
    return Plot(_svg(figure, axes, names, key="auc", columns=4 if wide else 3), "AUC per round", alt, wide)


def _epsilon_per_round(privacy: Mapping[str, Any], history: Entries, claim: str) -> Plot:
    figure, axes = _canvas(4.8, 3.3)
    names = _site_lines(axes, history, privacy["sites"], lambda entry, site: entry["epsilon"].get(site))
    cap, what = privacy["target_epsilon"], "target for the whole plan"
    if cap is None:
        cap, what = privacy["consortium"]["one_site"]["epsilon"], "charged for the whole plan"
    axes.axhline(cap, color=INK, linewidth=1.4, dashes=DASHES[0])
    axes.set(xlabel="round", ylabel=f"epsilon spent ({privacy['accountant'].upper()})")
    axes.set_ylim(bottom=0)
    # In the figure too: a figure is copied without its caption.
    axes.set_title(textwrap.fill(claim, 72), fontsize=7.5, loc="left", color=MUTED)
    alt = f"Line chart of the epsilon spent at each site, by round; {what}: {round_up(cap):.2f} ({claim})"
    svg = _svg(figure, axes, [*names, what], key="epsilon", columns=3)
    return Plot(svg, "Epsilon spent per round", alt)


def _auc_by_site(runs: Mapping[str, Any]) -> Plot:
    rows = [*runs["federated"]["sites"], "all sites"]
    figure, axes = _canvas(4.8, 1.4 + 0.36 * len(rows))
    empty = set(range(len(rows)))
    for index, run in enumerate(runs.values()):
        values = [run["sites"].get(site, {}).get("auc") for site in rows[:-1]] + [run["auc"]]
        drawn = {row: value for row, value in enumerate(values) if value is not None}
        empty -= drawn.keys()
        look = {"color": SERIES[index], "markerfacecolor": "none" if index else SERIES[0], "markersize": 8}
        axes.plot(list(drawn.values()), list(drawn), **look, marker=MARKERS[index], linestyle="none")
    for row in empty:
        axes.text(0.02, row, "no AUC", va="center", color=MUTED, transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(rows)), [_short(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axhspan(len(rows) - 1.5, len(rows) - 0.5, color=MUTED, alpha=0.12, linewidth=0)
    axes.set_xlabel("AUC (0 to 1, exact)")
    alt = f"Dot chart of the exact AUC per site: {', '.join(runs)}; the values stand in the table of results"
    return Plot(_svg(figure, axes, list(runs), key="sites", columns=3), "AUC per site", alt)


def _site_lines(axes: Any, history: Entries, sites: Any, value: Callable[..., float | None]) -> list[str]:
    """Thin curves; their names. Markers are staggered, so that curves that coincide are all seen."""
    curves = {site: [(e["round"], y) for e in history if (y := value(e, site)) is not None] for site in sites}
    curves = {site: points for site, points in curves.items() if points}
    for index, points in enumerate(curves.values()):
        step = max(1, len(points) // 5)
        look = {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}
        every = (index * step // len(curves), step)
        axes.plot(*zip(*points, strict=True), **look, markersize=5, linewidth=1.2, markevery=every)
    return list(curves)


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _short(name: str) -> str:
    return name if len(name) <= 26 else name[:25] + "…"


def _svg(figure: Any, axes: Any, names: Sequence[str], *, key: str, columns: int) -> str:
    lines = axes.get_lines()
    legend = figure.legend(lines, map(str, range(len(lines))), loc="outside lower center", ncols=columns)
    for text, name in zip(legend.get_texts(), names, strict=True):
        # Set afterwards: Matplotlib leaves out a label that begins with an underscore.
        text.set_text(_short(name))
    figure.set_figheight(figure.get_figheight() + 0.19 * (-(-len(names) // columns)))
    file, nothing = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{key}-", svg)
    return re.sub(r"(fill|stroke): #([0-9a-f]{6})\b", r"\1: var(--c\2, #\2)", svg)
