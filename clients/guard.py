"""What stands between a request and a site's data: its policy, a person's approval, its budget; then the gate.

`Guard` is a site with a folder of its own. `NoGuard` is for one person who plays all sites on one machine:
nothing is remembered, and nothing leaves the machine.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from flwr.app import RecordDict

from clients import site as local_site
from clients.asked import not_private
from clients.folder import SiteFolder
from clients.pause import Paused, is_paused
from clients.policy import ANY
from clients.refusal import Refusal, Rule
from clients.request import described
from fedmed.errors import FedmedError, ModelError
from fedmed.models.activations import ACTIVATIONS, ActivationCache, at_home
from fedmed.privacy.account import BudgetError
from fedmed.privacy.chain import LedgerError
from fedmed.privacy.events import to_json
from fedmed.privacy.histogram import metrics_plans
from fedmed.privacy.ledger import Ledger, Stored
from fedmed.privacy.plan import PrivacyPlan
from fedmed.privacy.release import Approved, Code, Ended, Gate, Privatised, Repeated
from fedmed.records import Arrays, Instruction, Quote, Receipt, digest

log = logging.getLogger("fedmed.site")


class Desk(Protocol):
    """Answers the coordinator's messages for one site."""

    def quote(self, instruction: Instruction, site: str) -> RecordDict:
        """Round 0: what the run would cost, or why not. No data is opened."""
        ...

    def train(self, instruction: Instruction, site: str, arrays: Arrays, content: RecordDict) -> RecordDict:
        """One round."""
        ...

    def evaluate(
        self, instruction: Instruction, site: str, arrays: Arrays, content: RecordDict
    ) -> RecordDict:
        """Scores of held-out patients: a private histogram, once a run, or exact counts."""
        ...

    def end(self, run: str) -> RecordDict:
        """The run is over: what it never used goes back."""
        ...


def activations(folder: SiteFolder) -> ActivationCache:
    """Where the site keeps what frozen parts of models make of its records: as private as these are."""
    return ActivationCache(folder.path / ACTIVATIONS, int(folder.policy.activations_gb * 1e9))


class NoGuard:
    """A site without a folder. Its own words may be shown: they stay with the person who runs everything."""

    gate = Gate(None)
    approval = "one person plays all sites"

    def __init__(self, device: str = "cpu") -> None:
        """
        Args:
            device: as `device` of site.yaml.
        """
        self._own = local_site.Own(cache=at_home(), device=device)

    def quote(self, instruction: Instruction, site: str) -> RecordDict:
        try:
            answer = local_site.quote(instruction, site)
        except FedmedError as error:
            # Declared values only have been read so far: the message can tell nothing about a record.
            answer = Quote(site=site, declared_size=0, epsilon=None, refusal=str(error))
        return self.gate.release(answer)

    def train(self, instruction: Instruction, site: str, arrays: Arrays, content: RecordDict) -> RecordDict:
        del content
        update = local_site.work(instruction, site, arrays, self._own)
        value = _receipt(instruction, site, update.noise_draws), update.delta
        return self.gate.release(
            Approved(site=site, run=instruction.run_id, value=value, approval=self.approval)
        )

    def evaluate(
        self, instruction: Instruction, site: str, arrays: Arrays, content: RecordDict
    ) -> RecordDict:
        del content
        score = local_site.private_score if instruction.privacy.metrics == "private" else local_site.score
        value = score(instruction, site, arrays, self._own)
        return self.gate.release(
            Approved(site=site, run=instruction.run_id, value=value, approval=self.approval)
        )

    def end(self, run: str) -> RecordDict:
        return self.gate.release(Ended(run))


@dataclass(frozen=True)
class Guard:
    """A site with its own folder: policy, approvals, ledger. Every check reads declared values and comes first."""

    folder: SiteFolder
    ledger: Ledger

    @property
    def gate(self) -> Gate:
        """What everything passes on its way out."""
        return Gate(self.ledger)

    def quote(self, instruction: Instruction, site: str) -> RecordDict:
        waiting = refusal = None
        epsilon, size = None, 0
        try:
            # What an officer decided meanwhile, in another process.
            self.ledger.refresh()
            self._check(instruction, site)
            answer = local_site.quote(instruction, site)
            epsilon, size = answer.epsilon, answer.declared_size
            waiting = self._approval(instruction, site)
            if waiting is None and not_private(instruction) is None:
                self._hold(instruction, site)
        except Refusal as error:
            refusal = str(error)
        except Paused:
            refusal = Code.PAUSED.value
        except ModelError as error:
            refusal = self._said(Code.MODEL, error)
        except LedgerError as error:
            refusal = self._said(Code.LEDGER, error)
        except BudgetError as error:
            refusal = self._said(Code.BUDGET, error)
        except FedmedError as error:
            refusal = self._said(Code.INSTRUCTION, error)
        answer = Quote(site=site, declared_size=size, epsilon=epsilon, refusal=refusal, waiting=waiting)
        if refusal == Code.LEDGER:
            # Without a ledger there is no receipt either.
            return Gate(None).release(answer)
        return self.gate.release(answer)

    @contextlib.contextmanager
    def _on_time(self) -> Iterator[None]:
        """Let whatever comes of a request, a failure too, leave at a multiple of the policy's grid (rule 19)."""
        began, grid = time.monotonic(), self.folder.policy.reply_grid_seconds
        try:
            yield
        finally:
            if grid:
                time.sleep(-(time.monotonic() - began) % grid)

    def train(self, instruction: Instruction, site: str, arrays: Arrays, content: RecordDict) -> RecordDict:
        with self._on_time():
            return self._train(instruction, site, arrays, content)

    def _train(self, instruction: Instruction, site: str, arrays: Arrays, content: RecordDict) -> RecordDict:
        self._check(instruction, site)
        with self._logged():
            approval = self._approved(instruction, site)

        def work() -> tuple[Receipt, Arrays]:
            update = local_site.work(self._here(instruction), site, arrays, self._own)
            return _receipt(instruction, site, update.noise_draws), update.delta

        if not_private(instruction) is not None:
            value = work()
            return self.gate.release(
                Approved(site=site, run=instruction.run_id, value=value, approval=approval)
            )
        self._check_promised(instruction, "train", _event(local_site.own_plan(instruction, site)))
        return self._charged(instruction, site, "train", content, work)

    def evaluate(
        self, instruction: Instruction, site: str, arrays: Arrays, content: RecordDict
    ) -> RecordDict:
        with self._on_time():
            return self._evaluate(instruction, site, arrays, content)

    def _evaluate(
        self, instruction: Instruction, site: str, arrays: Arrays, content: RecordDict
    ) -> RecordDict:
        self._check(instruction, site)
        with self._logged():
            approval = self._approved(instruction, site)
        if instruction.privacy.metrics == "private":
            histogram = metrics_plans(instruction.task, instruction.privacy)[site]
            self._check_promised(instruction, "metrics", to_json(histogram.event()))
            return self._charged(
                instruction,
                site,
                "metrics",
                content,
                lambda: local_site.private_score(self._here(instruction), site, arrays, self._own),
            )
        counts = local_site.score(self._here(instruction), site, arrays, self._own)
        return self.gate.release(Approved(site=site, run=instruction.run_id, value=counts, approval=approval))

    def end(self, run: str) -> RecordDict:
        self.ledger.end(run)
        return self.gate.release(Ended(run))

    def _charged(
        self,
        instruction: Instruction,
        site: str,
        purpose: str,
        content: RecordDict,
        mechanism: Callable[[], Any],
    ) -> RecordDict:
        """Reserve, open data, run a mechanism, commit; or the stored answer to the same request."""
        with self._logged():
            attempt = self.ledger.reserve(
                instruction.run_id, purpose=purpose, round=instruction.round, request=digest(content)
            )
        if isinstance(attempt, Stored):
            return self.gate.release(Repeated(instruction.run_id, attempt.content))
        try:
            local_site.load(instruction, self._own)
            with self._logged():
                self.ledger.open_data(attempt)
        except Exception:
            if attempt.state == "reserved":
                self.ledger.refund(attempt.nonce, by="site", why="it failed before data was opened")
            raise
        self.ledger.enrol(
            attempt.cohort, local_site.pseudonyms(self._here(instruction), site, self.folder.split_key)
        )
        return self.gate.release(Privatised(site=site, value=mechanism(), attempt=attempt))

    @property
    def _own(self) -> local_site.Own:
        device = self.folder.policy.device
        return local_site.Own(split_key=self.folder.split_key, cache=activations(self.folder), device=device)

    def _here(self, instruction: Instruction) -> Instruction:
        """The instruction as this site carries it out: on its own data, and in batches of its own choice."""
        data, training = self.folder.policy.data, instruction.training
        task = instruction.task if data in (None, ANY) else replace(instruction.task, path=data)
        # A size that the coordinator chose could fill this machine's memory, which tells how many patients there are.
        apart = replace(training, physical_batch_size=1 if self.folder.policy.patients_apart else None)
        return replace(instruction, task=task, training=apart)

    def _check(self, instruction: Instruction, site: str) -> None:
        """Return if the policy allows the run.

        Raises:
            Refusal: with the rule, the asked and the allowed value.
            Paused: the site takes no new run.
        """
        # What was promised goes on; a run that is NOT PRIVATE was promised nothing.
        if is_paused(self.folder.path) and not self.ledger.account.open_holds(instruction.run_id):
            log.warning("refused, since the site is paused; go on with: fedmed site pause DIR --resume")
            raise Paused
        policy = self.folder.policy
        if policy.name != site:
            raise Refusal(Rule.PLAN, asked="another site's part", allowed="this site's own")
        policy.check(instruction, site)
        policy.check_metrics("held_out", _release(instruction))

    def _approval(self, instruction: Instruction, site: str) -> str | None:
        """Why the run still waits for a person; None if it need not, or was approved.

        Raises:
            Refusal: a person refused it.
        """
        if not self.folder.policy.approvals(instruction, release=_release(instruction)):
            return None
        run, what = instruction.run_id, described(instruction, site, self.folder.policy.coordinator)
        decision = self.ledger.account.decisions.get(run)
        if decision is None or decision["what"]["digest"] != what["digest"]:
            self.ledger.request(run, what=what)
            return f"a person at the site has to approve run {run}"
        if not decision["approved"]:
            raise Refusal(Rule.APPROVAL, asked=f"run {run}", allowed="not this one: a person refused it")
        return None

    def _approved(self, instruction: Instruction, site: str) -> str:
        """Who allowed the run, for the ledger.

        Raises:
            Refusal: nobody did.
        """
        self.ledger.refresh()
        waiting = self._approval(instruction, site)
        if waiting:
            raise Refusal(
                Rule.APPROVAL, asked=f"run {instruction.run_id}", allowed="once a person approved it"
            )
        decision = self.ledger.account.decisions.get(instruction.run_id)
        return f"{decision['by']}: {decision['why']}" if decision else "the site's policy"

    def _hold(self, instruction: Instruction, site: str) -> None:
        """Promise the run its whole cost.

        Raises:
            Refusal: it does not fit.
        """
        plan = local_site.own_plan(instruction, site)
        policy, event = self.folder.policy, _event(plan)
        histogram = metrics_plans(instruction.task, instruction.privacy).get(site)
        cohort = self.ledger.account.cohort(policy.cohort)
        if cohort.declared_size < policy.min_declared_size:
            raise Refusal(
                Rule.DECLARED_SIZE, asked="this site's cohort", allowed=f"at least {policy.min_declared_size}"
            )
        budget = cohort.budget
        if budget is None or budget.epsilon > policy.epsilon_total or budget.delta > policy.delta_total:
            total = f"{policy.epsilon_total:g} and delta {policy.delta_total:g}"
            log.error(
                "the budget of cohort '%s' is not set, or above site.yaml's epsilon %s", cohort.name, total
            )
            raise Refusal(Rule.BUDGET, asked=f"{plan.rounds} rounds", allowed="0")
        self._check_same_promise(instruction.run_id, plan.rounds, metrics=histogram is not None)
        try:
            self.ledger.hold(
                instruction.run_id, cohort=cohort.name, purpose="train", event=event, rounds=plan.rounds
            )
        except BudgetError as error:
            log.warning("refused: %s", error)
            held = self.ledger.account.holds.get((instruction.run_id, "train"))
            fits = budget.rounds_that_fit(cohort.charges, event) + (held.rounds if held else 0)
            raise Refusal(Rule.BUDGET, asked=f"{plan.rounds} rounds", allowed=f"at most {fits}") from None
        if histogram is None:
            return
        try:
            self.ledger.hold(
                instruction.run_id,
                cohort=cohort.name,
                purpose="metrics",
                event=to_json(histogram.event()),
                rounds=1,
            )
        except BudgetError as error:
            log.warning("refused: %s", error)
            self.ledger.end(instruction.run_id, by="site", why="its metrics do not fit")
            raise Refusal(
                Rule.BUDGET, asked=f"{plan.rounds} rounds and metrics", allowed="no metrics"
            ) from None

    def _check_same_promise(self, run: str, rounds: int, *, metrics: bool) -> None:
        """Return if a run that is quoted again asks for all that it was promised, and so was checked as a whole.

        Each quote is held against `epsilon_per_run` by itself: rounds of one and metrics of another add up to more.

        Raises:
            Refusal: it leaves out its metrics, or some of the rounds beside metrics that are new.
        """
        holds = self.ledger.account.holds
        trained, drawn = holds.get((run, "train")), holds.get((run, "metrics"))
        fewer = trained is not None and rounds < trained.rounds
        if (drawn is not None and not metrics) or (drawn is None and metrics and fewer):
            raise Refusal(Rule.PLAN, asked="another part of the run", allowed="all that it was promised")

    def _check_promised(self, instruction: Instruction, purpose: str, event: str) -> None:
        """Return if what is about to run is what the run's promise was charged for, on the patients it is charged to.

        Raises:
            BudgetError: it is another mechanism or cohort, or nothing was promised.
        """
        self.ledger.refresh()
        held = self.ledger.account.holds.get((instruction.run_id, purpose))
        # site.yaml may name another cohort, and its patients, than when the run was promised its budget.
        promised = held is not None and (held.event, held.cohort) == (event, self.folder.policy.cohort)
        if instruction.round < 1 or not promised:
            raise BudgetError(f"run '{instruction.run_id}': not the {purpose} that was promised")

    @contextlib.contextmanager
    def _logged(self) -> Iterator[None]:
        """Put what the ledger says, and what to do about it, into the site's log; none of it leaves."""
        try:
            yield
        except LedgerError as error:
            self._said(Code.LEDGER, error)
            raise

    def _said(self, code: Code, error: FedmedError) -> str:
        """The code that leaves; the words stay in the site's log."""
        log.error("%s: %s", code, error)
        return code.value


def _release(instruction: Instruction) -> Any:
    return instruction.privacy.metrics


def _event(plan: PrivacyPlan) -> str:
    """What one round costs."""
    return to_json(plan.event(rounds=1))


def _receipt(instruction: Instruction, site: str, noise_draws: int) -> Receipt:
    return Receipt(
        site=site,
        round=instruction.round,
        declared_size=instruction.task.declared_train(site),
        noise_draws=noise_draws,
    )
