"""What a person sees of a run: live progress, then a table."""

import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fedmed.privacy.in_words import round_up
from fedmed.report.units import unit_sentence, unit_table, units_compared


def plain_console() -> Console:
    """A console that shows values as they are: `[a]` is no markup, `:heart:` no emoji."""
    return Console(highlight=False, markup=False, emoji=False)


class RunConsole:
    """Prints progress: a live bar on a terminal, one line a round elsewhere."""

    def __init__(self) -> None:
        self._console = plain_console()
        self._bar: Progress | None = None
        self._task: Any = None

    def say(self, text: str, style: str = "") -> None:
        """One line."""
        (self._bar.console if self._bar else self._console).print(text, style=style, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line that stands out."""
        self.say(f"warning: {text}", style="yellow")

    def begin(self, title: str, rounds: int, done: int = 0) -> None:
        """Start showing rounds."""
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[status]}", markup=False),
                console=self._console,
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=rounds, completed=done, status="")
            self._bar.start()
        else:
            self.say(f"{title}: {rounds - done} rounds")

    def round_done(self, entry: dict[str, Any], rounds: int, *, private: bool) -> None:
        """Show a finished round."""
        parts = []
        # A run that was started by an earlier version evaluated every round.
        if entry.get("evaluated", True):
            auc = "one class" if entry["auc"] is None else f"{entry['auc']:.3f}"
            parts.append(f"AUC {auc} (exact)")
        if private:
            parts.append(f"epsilon {round_up(max(entry['epsilon'].values())):.2f}")
        parts += [f"{entry['bytes_up'] / 1000:.1f} kB up", f"{entry['seconds']:.2f} s"]
        status = ", ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, advance=1, status=status)
        else:
            self.say(f"round {entry['round']:>3}/{rounds}  {status}")

    def end(self) -> None:
        """Stop showing rounds; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def table(self, summary: dict[str, Any]) -> None:
        """The result: what was spent and what was learned, per site and overall."""
        privacy, test = summary["privacy"], summary["test"]
        title = f"{summary['task']}: {summary['model']}, {summary['adapter']}, {summary['strategy']}"
        table = _narrow(title, "site", "declared\ntraining size")
        if privacy["private"]:
            table.add_column("epsilon\n(PLD)", justify="right")
        table.add_column("AUC*", justify="right")
        table.add_column("accuracy*", justify="right")
        last = list(privacy["sites"])[-1]
        for site, spent, result in _rows(privacy, test):
            cells = [site, str(spent["declared_size"]) if spent else str(_total(privacy))]
            if privacy["private"]:
                epsilon = spent["epsilon"] if spent else privacy["consortium"]["one_site"]["epsilon"]
                cells.append(f"{round_up(epsilon):.2f}")
            cells += [_figure(result, name, test["release"]) for name in ("auc", "accuracy")]
            table.add_row(*cells, end_section=site == last)
        self._console.print(table)
        if summary["references"]:
            self._console.print(_references(summary))
        for line in footnotes(summary):
            self.say(line, style="bold red" if line.startswith("NOT PRIVATE") else "")
        comparison = units_compared(summary)
        if comparison is not None:
            self._console.print(_units(comparison))
            self.say(unit_sentence(comparison))


def _narrow(title: str, first: str, *others: str) -> Table:
    """Without vertical lines, so that names fit into 80 columns."""
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def _rows(privacy: dict[str, Any], result: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Each site with what it spent and its figures; all of them together last."""
    sites = [(site, spent, result["sites"].get(site)) for site, spent in privacy["sites"].items()]
    return [*sites, ("all sites", None, result)]


def _references(summary: dict[str, Any]) -> Table:
    """The references beside the run: a table of its own, since one of all figures is wider than a terminal."""
    privacy, references = summary["privacy"], summary["references"]
    names = [name.replace("_", " ") for name in references]
    table = _narrow("AUC* / accuracy* beside the references", "site", "this run", *names)
    sites = _rows(privacy, summary["test"])
    others = [_rows(privacy, reference) for reference in references.values()]
    for index, (site, _, result) in enumerate(sites):
        release = summary["test"]["release"]
        cells = [f"{_figure(result, 'auc', release)} / {_figure(result, 'accuracy', release)}"]
        for rows in others:
            cells.append(f"{_figure(rows[index][2], 'auc')} / {_figure(rows[index][2], 'accuracy')}")
        table.add_row(site, *cells, end_section=index == len(sites) - 2)
    return table


def _units(compared: dict[str, Any]) -> Table:
    table = Table(title="patient-level against image-level clipping", box=box.SIMPLE_HEAD)
    for name in (
        "clipped and\nsampled",
        "AUC*",
        "epsilon (PLD)\nfor one image",
        "epsilon (PLD)\nfor a patient",
    ):
        table.add_column(name, justify="left" if name.startswith("clipped") else "right")
    for row in unit_table(compared):
        table.add_row(*row)
    return table


def footnotes(summary: dict[str, Any]) -> list[str]:
    """What must stand below the table."""
    privacy = summary["privacy"]
    lines = [f"* {release_in_words(summary['test'])}"]
    if privacy["private"]:
        rdp = max(site["epsilon_rdp"] for site in privacy["sites"].values())
        everywhere = privacy["consortium"]["all_sites"]["epsilon"]
        lines += [
            f"epsilon: {privacy['adjacency']}; delta {privacy['delta']:g}; PLD accountant "
            f"(RDP would say {round_up(rdp):.2f}); a patient at every site: {round_up(everywhere):.2f}",
            privacy["in_words"],
        ]
        lines += parts_in_words(privacy)
    else:
        lines.append(f"NOT PRIVATE: {privacy['not_private_reason']}")
    if summary["references"]:
        lines.append(
            "references trained on the same patients again, outside this epsilon: for public benchmarks only"
        )
    return lines


def release_in_words(test: dict[str, Any]) -> str:
    """What a figure on held-out patients is."""
    if test["release"] == "private":
        error = test["expected_auc_error"]
        return f"private, on held-out patients: in epsilon; expected error of the AUC {error:.3f}"
    if test["release"] == "none":
        return "not evaluated (privacy.metrics=none)"
    return "exact, on held-out patients: not covered by epsilon"


def parts_in_words(privacy: dict[str, Any]) -> list[str]:
    """What a site's epsilon is composed of, where it has two parts."""
    if privacy["metrics"]["release"] != "private":
        return []
    sites = privacy["sites"].values()
    training, metrics = (
        max(site[part] for site in sites) for part in ("epsilon_training", "epsilon_metrics")
    )
    return [
        f"epsilon is composed of training ({round_up(training):.2f}) and private metrics ({round_up(metrics):.2f}): "
        "both are charged to every patient, trained on or held out"
    ]


def _figure(values: dict[str, Any] | None, name: str, release: str = "exact") -> str:
    if release == "none":
        return "none"
    if values is None:
        return "no answer"
    if values[name] is None:
        return "too few" if release == "private" else "one class"
    return f"{values[name]:.3f}"


def _total(privacy: dict[str, Any]) -> int:
    return sum(site["declared_size"] for site in privacy["sites"].values())


def print_forecast(values: dict[str, Any]) -> None:
    """The forecast of `fedmed plan`."""
    console = plain_console()
    privacy, seconds = values["privacy"], values["seconds"]
    # Without vertical lines, so that a hospital's name fits into 80 columns.
    title = f"forecast: {values['rounds']} rounds of {values['steps_per_round']} steps"
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("site", "declared\ntraining size", "epsilon\n(PLD)", "epsilon\n(RDP)", "delta", "noise\nmultiplier",
                 "sample\nrate", "steps"):  # fmt: skip
        table.add_column(name, justify="left" if name == "site" else "right", overflow="fold")
    for site, plan in privacy["sites"].items():
        if privacy["private"]:
            spent = [
                f"{round_up(plan['epsilon']):.2f}",
                f"{round_up(plan['epsilon_rdp']):.2f}",
                f"{plan['delta']:g}",
            ]
        else:
            spent = ["NOT PRIVATE", "", ""]
        table.add_row(
            site, str(plan["declared_size"]), *spent, f"{plan['noise_multiplier']:.3f}", f"{plan['sample_rate']:g}",
            str(plan["steps"]),
        )  # fmt: skip
    console.print(table)
    lines = [
        f"bytes a round, all sites: {values['bytes_up_per_round']:,} up, {values['bytes_down_per_round']:,} down",
        memory_in_words(values["memory"]),
        f"measured here, one core, made-up records of the largest site: {seconds['step']:.3f} s a step, "
        f"{seconds['prepare']:.1f} s once to prepare, {seconds['training_per_site']:.1f} s of training a site",
        "nothing was trained and no record was opened to train on",
    ]
    if privacy["private"]:
        everywhere = privacy["consortium"]["all_sites"]["epsilon"]
        lines.insert(
            0, f"epsilon: {privacy['adjacency']}; a patient at every site: {round_up(everywhere):.2f} (PLD)"
        )
        lines[1:1] = [privacy["in_words"], *parts_in_words(privacy)]
        if privacy["metrics"]["release"] == "private":
            lines.insert(3, f"expected error of the AUC: {privacy['metrics']['expected_auc_error']:.3f}")
    else:
        lines.insert(0, f"NOT PRIVATE: {privacy['not_private_reason']}")
    for line in lines:
        console.print(line, soft_wrap=True)
    for ledger in values.get("ledgers", []):
        for line in ledger_lines(ledger):
            console.print(line, soft_wrap=True)


def memory_in_words(memory: dict[str, Any]) -> str:
    """What a round takes in memory at both ends."""
    payload = (
        f"{memory['coordinator_payloads']:.1f} times the adapter's {1e6 * memory['payload_mb']:,.0f} bytes"
    )
    at_once = " (the strategy needs all updates at once)" if memory["all_updates_at_once"] else ""
    coordinator, site = f"{memory['coordinator_mb']:,.0f} MB", f"{memory['site_mb']:,.0f} MB"
    return f"memory at most: coordinator {coordinator}, {payload}{at_once} and the program; a site {site} (measured)"


def ledger_lines(values: dict[str, Any]) -> list[str]:
    """A run's cost against what is left in one site's ledger."""
    budget = values["budget"]

    def epsilon(figures: dict[str, Any]) -> str:
        pld = figures["epsilon_pld"]
        beyond = "beyond reckoning" if pld is None else f"{round_up(pld):.2f}"
        return f"epsilon {round_up(figures['epsilon']):.2f} (PLD {beyond})"

    lines = [
        "",
        f"ledger of site '{values['site']}', cohort '{values['cohort']}': epsilon {budget['epsilon']:g} at delta "
        f"{budget['delta']:g}, by a Renyi filter of order {budget['renyi_order']}, which binds; PLD beside it",
        f"  before    {epsilon(values['before'])}, spent or promised",
    ]
    if values["verdict"] == "not charged":
        reason = values["not_private_reason"]
        return [
            *lines,
            f"  NOT PRIVATE ({reason}): no budget covers this run; the site would need an approval for it",
        ]
    cost, fits = values["cost"], values["verdict"] == "fits"
    given = round_up(values["noise_multiplier"], 3)
    metrics = f", private metrics {epsilon(cost['metrics'])}" if cost["metrics"] else ""
    lines += [
        f"  this run  {epsilon(cost)} by itself: training {epsilon(cost['training'])}{metrics}",
        f"  after     {epsilon(values['after'])}",
        "  fits: the site's budget holds the whole run; its policy and its people may still refuse"
        if fits
        else f"  refused: {values['rounds']} rounds do not fit into what is left; the site would not start the run",
        f"  rounds that fit with noise multiplier {given:g}: {values['rounds_that_fit']:,}",
    ]
    noise = values["noise_multiplier_that_fits"]
    if not values["metrics_fit"]:
        return [
            *lines,
            "  the private metrics alone do not fit: take privacy.metrics=none, or a smaller metrics_epsilon",
        ]
    if noise is None:
        return [*lines, f"  no noise multiplier that can be set makes {values['rounds']} rounds fit"]
    setting = f"privacy.epsilon=null privacy.noise_multiplier={noise:g}"
    return [*lines, f"  smallest noise multiplier for {values['rounds']} rounds: {noise:g} ({setting})"]
