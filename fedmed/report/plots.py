"""The report's figures as SVG, drawn through Matplotlib's objects: pyplot's global state is not touched."""

import contextlib
import io
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from fedmed.privacy.in_words import round_up

# Okabe and Ito's colour-blind-safe hues, darkened to stand out on white; the template maps each of these to
# one that stands out on black. Markers tell the sites apart without colour.
INK, MUTED = "#1c2024", "#5b636b"
SERIES = ["#0072b2", "#c44e00", "#00805d", "#a8467f", "#946400", "#4b4bd0"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
DASHES = [(5, 3), (1, 2), (6, 2, 1, 2)]
STYLE: Any = {
    # Text stays text (searchable, in the page's font), and a site named $x$ is no formula.
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "fedmed",
    "font.size": 9,
} | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
Entries = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Plot:
    """A figure as an SVG document, its title and its text alternative."""

    svg: str
    title: str
    alt: str
    wide: bool = False


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Inside, figures are drawn in the reports' look."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The browser draws the text: a letter that Matplotlib's font lacks is no loss.
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def draw(privacy: Mapping[str, Any], history: Entries, runs: Mapping[str, Any], *, claim: str) -> list[Plot]:
    """The figures of a run. `claim` stands beside epsilon; without one (NOT PRIVATE) no epsilon is drawn."""
    plots: list[Plot] = []
    with styled():
        evaluated = any(entry["auc"] is not None or entry["site_metrics"] for entry in history)
        if evaluated:
            # The first of an odd number of figures has a row of its own.
            plots.append(_auc_per_round(privacy, history, runs, wide=bool(claim) == (len(runs) > 1)))
        if history and claim:
            plots.append(_epsilon_per_round(privacy, history, claim))
        if len(runs) > 1:
            plots.append(_auc_by_site(privacy, runs))
    return plots


def _auc_per_round(privacy: Any, history: Entries, runs: Mapping[str, Any], *, wide: bool) -> Plot:
    figure, axes = canvas(9.6 if wide else 4.8, 3.3)
    names = _site_lines(axes, history, privacy, lambda e, site: e["site_metrics"].get(site, {}).get("auc"))
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
    axes.set(xlabel="round", ylabel="AUC (0 to 1, exact)", ylim=(None, min(1.01, axes.get_ylim()[1])))
    return Plot(to_svg(figure, axes, names, columns=4 if wide else 3), "AUC per round", alt, wide)


def _epsilon_per_round(privacy: Mapping[str, Any], history: Entries, claim: str) -> Plot:
    figure, axes = canvas(4.8, 3.3)
    names = _site_lines(axes, history, privacy, lambda entry, site: entry["epsilon"].get(site))
    cap, what = privacy["target_epsilon"], "target for the whole plan"
    private_metrics = privacy["metrics"]["release"] == "private"
    if private_metrics:
        cap, what = privacy["consortium"]["one_site"]["epsilon"], "with the metrics"
    elif cap is None:
        cap, what = privacy["consortium"]["one_site"]["epsilon"], "charged for the whole plan"
    axes.axhline(cap, color=INK, linewidth=1.4, dashes=DASHES[0])
    axes.set(xlabel="round", ylabel=f"epsilon spent ({privacy['accountant'].upper()})", ylim=(0, None))
    # In the figure too: a figure is copied without its caption.
    axes.set_title(textwrap.fill(claim, 72), fontsize=7.5, loc="left", color=MUTED)
    alt = f"Line chart of the epsilon spent at each site, by round; {what}: {round_up(cap):.2f} ({claim})"
    return Plot(to_svg(figure, axes, [*names, what], columns=3), "Epsilon spent per round", alt)


def _auc_by_site(privacy: Mapping[str, Any], runs: Mapping[str, Any]) -> Plot:
    rows = [*privacy["sites"], "all sites"]
    figure, axes = canvas(4.8, 1.4 + 0.36 * len(rows))
    empty = set(range(len(rows)))
    # Each run a little lower, so that equal values are all seen.
    apart = 0.4 / max(2, len(runs) - 1)
    for index, (marker, run) in enumerate(zip(MARKERS, runs.values(), strict=False)):
        lower = index * apart - 0.2
        values = [run["sites"].get(site, {}).get("auc") for site in rows[:-1]] + [run["auc"]]
        drawn = {row: value for row, value in enumerate(values) if value is not None}
        empty -= drawn.keys()
        look = {"color": INK, "markerfacecolor": INK if marker == MARKERS[0] else "none", "markersize": 7}
        axes.plot(list(drawn.values()), [row + lower for row in drawn], marker, **look)
    for row in empty:
        axes.text(0.02, row, "no AUC", va="center", color=MUTED, transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(rows)), [_short(row) for row in rows])
    axes.axhspan(len(rows) - 1.5, len(rows) - 0.5, color=MUTED, alpha=0.12, linewidth=0)
    axes.set(xlabel="AUC (0 to 1, exact)", ylim=(len(rows) - 0.5, -0.5))
    axes.locator_params(axis="x", nbins=6)
    alt = f"Dot chart of the exact AUC per site: {', '.join(runs)}; the values stand in the table of results"
    return Plot(to_svg(figure, axes, list(runs), columns=min(4, len(runs))), "AUC per site", alt)


def _site_lines(axes: Any, history: Entries, privacy: Any, value: Callable[..., float | None]) -> list[str]:
    """Thin curves; their names. Markers are staggered, so that curves that coincide are all seen."""
    count, names = len(privacy["sites"]), []
    step = max(count, len(history) // 5)
    # By the place in the plan, so that a site looks the same in every figure.
    for index, site in enumerate(privacy["sites"]):
        points = [(entry["round"], y) for entry in history if (y := value(entry, site)) is not None]
        if points:
            look = {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}
            every = (index * step // count % len(points), step)
            axes.plot(*zip(*points, strict=True), **look, markersize=5, linewidth=1.2, markevery=every)
            names.append(site)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return names


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """An empty figure and its axes; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=MUTED, alpha=0.25)
    return figure, axes


def _short(name: str) -> str:
    return name if len(name) <= 26 else name[:25] + "…"


def to_svg(figure: Any, axes: Any, names: Sequence[str], *, columns: int) -> str:
    """The figure as an SVG document, with a legend of its lines below: one name each."""
    lines, places = axes.get_lines(), {"loc": "outside lower center", "ncols": columns, "frameon": False}
    legend = figure.legend(lines, map(str, range(len(lines))), **places)
    for text, name in zip(legend.get_texts(), names, strict=True):
        # Set afterwards: Matplotlib leaves out a label that begins with an underscore.
        text.set_text(_short(name))
    figure.set_figheight(figure.get_figheight() + 0.19 * (-(-len(names) // columns)))
    file, nothing = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return file.getvalue()


def spent_over_time(statement: Mapping[str, Any]) -> Plot | None:
    """What each cohort spent, with its budget, from a ledger's statement; None where no budget was ever set.

    Marks on the axis are releases that no epsilon covers.
    """
    cohorts = {name: cohort for name, cohort in statement["cohorts"].items() if cohort["series"]}
    if not cohorts:
        return None
    end, names, said = datetime.fromisoformat(statement["last"]), [], []
    with styled():
        figure, axes = canvas(9.6, 2.1)
        for index, (name, cohort) in enumerate(cohorts.items()):
            series, colour = cohort["series"], SERIES[index % len(SERIES)]
            times = [*(datetime.fromisoformat(point["time"]) for point in series), end]
            spent = [point["epsilon"] for point in series]
            limit = [point["budget"] for point in series]
            axes.step(times, [*spent, spent[-1]], where="post", color=colour, linewidth=1.8)
            axes.step(times, [*limit, limit[-1]], where="post", color=colour, linewidth=1.4, dashes=DASHES[0])
            names += [f"{name}: spent", f"{name}: budget"]
            said.append(f"{name}: {spent[-1]:.2f} of {limit[-1]:g}")
        outside = [release["time"] for group in statement["outside"] for release in group["releases"]]
        if outside:
            times, look = [datetime.fromisoformat(time) for time in outside], {"color": INK, "clip_on": False}
            axes.plot(times, [0] * len(times), "X", markersize=7, zorder=3, **look)
            names.append("outside the guarantee")
            said.append(f"{len(outside)} releases outside the guarantee")
        # All in one second would be drawn as years.
        begin = datetime.fromisoformat(statement["first"])
        pad = max((end - begin) / 40, timedelta(minutes=30))
        axes.set_xlim(begin - pad, end + pad)
        axes.set(ylabel="epsilon (Renyi filter)", ylim=(0, None))
        axes.xaxis.set_major_formatter(_days(axes))
        alt = f"Step chart of the epsilon spent over time, by cohort; {'; '.join(said)}"
        return Plot(to_svg(figure, axes, names, columns=4), "Spent over time", alt, wide=True)


def _days(axes: Any) -> Any:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(minticks=3, maxticks=8)
    axes.xaxis.set_major_locator(locator)
    return ConciseDateFormatter(locator)
