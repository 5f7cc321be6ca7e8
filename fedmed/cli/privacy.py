"""`fedmed privacy audit`: what holds the code against its claims. Heavy imports wait until a command runs."""

import json
import re
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedmed.privacy.audit import Audit
    from fedmed.privacy.checks import Check

PRIVACY_HELP = """Set budgets, read and check a site's ledger, audit the code.

\b
Examples:
  fedmed privacy budget set default --epsilon 6 --why "board of 3 May" --site /srv/fedmed
  fedmed privacy report --site /srv/fedmed
  fedmed privacy verify --site /srv/fedmed --receipts runs/20261122-101500-demo
  fedmed privacy audit
"""

AUDIT_HELP = """Audit the installed DP-SGD with made-up patients.

For each claim, one run with orthogonal gradient canaries gives a lower bound on epsilon (Steinke, Nasr and
Jagielski 2023). Four more checks see what no audit can: the noise's variance, the steps that were noised, the
divisor, and the clipping of a patient with many records. No real record is read. A low bound is not evidence
of privacy, and a claim above about 4 is out of one run's reach.

Exit codes: 0 no check failed, 1 a check failed, 2 a wrong option.

\b
Examples:
  fedmed privacy audit                              claims 1 and 3, about 10 seconds
  fedmed privacy audit --epsilon 2 --delta 1e-5
  fedmed privacy audit --sample-rate 0.2 --rounds 30
  fedmed privacy audit --json > audit.json
"""

STEPS_PER_ROUND = 2

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback(help=PRIVACY_HELP)
def privacy() -> None:
    """What a privacy officer does."""


@app.command("audit", help=AUDIT_HELP)
def audit_command(
    epsilon: Annotated[
        list[float] | None,
        typer.Option(metavar="NUMBER", help="A claim to audit; may be repeated. [default: 1 and 3]"),
    ] = None,
    delta: Annotated[float, typer.Option(metavar="NUMBER", help="The delta of every claim.")] = 1e-4,
    canaries: Annotated[int, typer.Option(metavar="N", help="Made-up patients, 100 to 3000.")] = 1000,
    guesses: Annotated[
        int, typer.Option(metavar="N", help="How many canaries are guessed, fixed beforehand; even.")
    ] = 200,
    rounds: Annotated[int, typer.Option(metavar="N", help="Rounds of 2 steps, 1 to 1000.")] = 10,
    sample_rate: Annotated[
        float, typer.Option(metavar="NUMBER", help="Probability with which a patient enters a step.")
    ] = 1.0,
    device: Annotated[
        str,
        typer.Option(metavar="NAME", help="auto (the first GPU, else the processor), cpu, cuda or cuda:N."),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check every option, audit each claim, print, end with 1 where a check failed."""
    from fedmed.config import DEVICE
    from fedmed.errors import require

    claims = list(dict.fromkeys(epsilon or [1.0, 3.0]))
    for claim in claims:
        require(0.01 <= claim <= 100, "--epsilon", claim, "0.01 to 100")
    require(0 < delta <= 0.01, "--delta", delta, "above 0, at most 0.01")
    require(100 <= canaries <= 3000, "--canaries", canaries, "100 to 3000")
    even = 2 <= guesses <= canaries and guesses % 2 == 0
    require(even, "--guesses", guesses, f"an even number, at most --canaries={canaries}")
    require(1 <= rounds <= 1000, "--rounds", rounds, "1 to 1000")
    require(0 < sample_rate <= 1, "--sample-rate", sample_rate, "0 < rate <= 1")
    require(re.fullmatch(DEVICE, device) is not None, "--device", device, "auto, cpu, cuda or cuda:N")

    from fedmed.devices import device_of, in_words
    from fedmed.privacy.audit import CAUTION, audit
    from fedmed.privacy.plan import PrivacyPlan
    from fedmed.privacy.randomness import operating_system
    from fedmed.training import one_thread

    one_thread()
    where = device_of(device)
    plans = [
        PrivacyPlan(
            unit="patient", declared_size=canaries, sample_rate=sample_rate, records_per_patient=1,
            max_grad_norm=1.0, noise_multiplier=0.0, steps_per_round=STEPS_PER_ROUND, rounds=rounds, delta=delta,
        ).calibrate(epsilon=claim)
        for claim in claims
    ]  # fmt: skip
    audits = []
    start = time.monotonic()
    for claim, plan in zip(claims, plans, strict=True):
        progress = _Progress(f"epsilon {claim:g}")
        audits.append(
            audit(
                plan,
                source=operating_system(),
                canaries=canaries,
                guesses=guesses,
                device=where,
                progress=progress,
            )
        )
        progress.clear()
        if not as_json:
            _print(claim, audits[-1])
    passed = all(done.passed for done in audits)
    seconds = time.monotonic() - start
    if as_json:
        values = {
            "result": "passed" if passed else "failed", "caution": CAUTION, "seconds": round(seconds, 1),
            "device": in_words(where),
            "claims": [{"asked_epsilon": claim, **done.report()} for claim, done in zip(claims, audits, strict=True)],
        }  # fmt: skip
        typer.echo(json.dumps(values, indent=2, allow_nan=False))
    else:
        typer.echo(
            f"{'No check failed' if passed else 'A CHECK FAILED'} ({seconds:.0f} s on {in_words(where)}). {CAUTION}"
        )
    if not passed:
        raise typer.Exit(1)


class _Progress:
    """One line on standard error that is overwritten; nothing where nobody looks."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._shown = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self._shown:
            print(f"\r\x1b[K{self._title}: {text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _print(claim: float, done: "Audit") -> None:
    typer.echo(
        f"claim: epsilon {claim:g} at delta {done.delta:g} "
        f"({done.steps} steps, noise multiplier {done.noise_multiplier:.3f}, {done.canaries} canaries)"
    )
    for check in done.checks:
        typer.echo(f"  {check.name:<9} {check.result:<14}  {_figures(check)}")
        typer.echo(f"  {'':<9} {'':<14}  sees: {check.sees}")
    typer.echo()


def _figures(check: "Check") -> str:
    """A check's figures, in words."""
    f = check.figures
    match check.name:
        case "canaries":
            bound = (
                f"lower bound {f['lower_bound']:.2f} at {f['confidence']:.0%} confidence, "
                f"{f['right_guesses']} of {f['guesses']} guesses right"
            )
            if f["claim"] >= f["largest_possible_bound"]:
                bound += f"; code without any noise would reach {f['largest_possible_bound']:.2f}, less than the claim"
            return bound
        case "variance":
            return (
                f"{f['variance_of_a_round']:.3f} of what is accounted in a round, {f['variance_of_the_run']:.3f} "
                f"in the run, over {f['directions']} untouched directions"
            )
        case "counting":
            return (
                f"{f['accounted_steps']} steps accounted; counted at the source: {f['counted_at_the_source']:.4g}, "
                f"on empty batches {f['counted_on_empty_batches']:.4g}; as reported {f['reported']}"
            )
        case "coupled":
            return (
                f"batches of 1 and {2 * f['n']}: noise {f['noise_with_1']:.3f} and {f['noise_with_2n']:.3f} of an "
                f"empty batch's, a patient's weight {f['patient_in_1']:.3f} and {f['patient_in_2n']:.3f} of the plan's"
            )
        case _:
            return (
                f"removing a patient with {f['records_of_the_patient']} records changes a step by {f['change']:.3f} "
                "of what is allowed"
            )
