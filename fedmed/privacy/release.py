"""The one way out of a site. Nothing else makes a reply, a metric, a count, or a word of error for outside.

A value leaves because it is data-independent by its type (a quote, a refusal, a code), because it is a
mechanism's output that the ledger was charged for, or because a person allowed it, and then stands in the ledger as
outside every guarantee. Whatever is none of these does not type-check, and raises.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedmed.errors import PrivacyError
from fedmed.metrics import ScoreCounts
from fedmed.privacy.account import Attempt
from fedmed.privacy.histogram import HistogramPlan
from fedmed.privacy.ledger import Ledger
from fedmed.records import (
    Arrays,
    Quote,
    Receipt,
    ended_record,
    from_bytes,
    head_record,
    private_scores_record,
    quote_record,
    scores_record,
    to_bytes,
    update_record,
)


class Code(StrEnum):
    """What a site says of a failure: the whole of it. Data has not been opened, except in `FAILED`."""

    # The instruction cannot be read, or is of another version.
    INSTRUCTION = "bad-instruction"
    # The encoder is missing here, or is not the pinned one.
    MODEL = "model-unavailable"
    # The ledger cannot be used; the site's engineer sees why.
    LEDGER = "ledger-unavailable"
    # The budget does not hold the run, or the run's promise is used up.
    BUDGET = "budget"
    # The site takes no new run for now.
    PAUSED = "paused"
    # What the coordinator shipped is not the installed fedmed.
    BUNDLE = "unknown-bundle"
    # Anything, once data has been opened (rule 19).
    FAILED = "site-failed"


@dataclass(frozen=True, kw_only=True)
class Privatised:
    """What a mechanism drew, whose cost was reserved as `attempt`: a DP-SGD update with its receipt of declared
    values, or a noisy histogram with its plan."""

    site: str
    value: tuple[Receipt, Arrays] | tuple[HistogramPlan, NDArray[np.float64]]
    attempt: Attempt


@dataclass(frozen=True, kw_only=True)
class Approved:
    """True values that no epsilon covers.

    Attributes:
        approval: who or what allowed it, for the ledger.
    """

    site: str
    run: str
    value: ScoreCounts | tuple[Receipt, Arrays] | tuple[HistogramPlan, NDArray[np.float64]]
    approval: str


@dataclass(frozen=True)
class Repeated:
    """What an equal request of a run was answered with before."""

    run: str
    content: bytes


@dataclass(frozen=True)
class Ended:
    """That a run is over, as the coordinator said."""

    run: str


Releasable = Quote | Privatised | Approved | Repeated | Ended


class Gate:
    """Turns what may leave into the content of a reply.

    Args:
        ledger: of the site; None where one person plays all sites on one machine, and nothing leaves it.
    """

    def __init__(self, ledger: Ledger | None) -> None:
        self._ledger = ledger

    def release(self, value: Releasable) -> RecordDict:
        """The reply's content. What was charged is committed, what was approved is written down, before this returns.

        Raises:
            PrivacyError: the value is none that may leave.
            LedgerError, BudgetError: it could not be written down; nothing leaves.
        """
        content = self._content(value)
        if self._ledger is not None:
            head = self._ledger.head()
            content["ledger"] = head_record(head["hash"], head["signature"], self._drawn(value))
        return content

    def _drawn(self, value: Releasable) -> int | None:
        """How many rounds of the value's run the ledger was charged for: as many as were asked for and not refunded."""
        assert self._ledger is not None
        if isinstance(value, Quote):
            return None
        run = value.attempt.run if isinstance(value, Privatised) else value.run
        return self._ledger.account.drawn(run)

    def _content(self, value: Releasable) -> RecordDict:
        if isinstance(value, Quote):
            return quote_record(value)
        if isinstance(value, Privatised):
            if self._ledger is None:
                raise PrivacyError("something that was charged for, without a ledger to commit it to")
            content = _drawn(value.site, value.value)
            self._ledger.commit(value.attempt, to_bytes(content))
            return content
        if isinstance(value, Approved):
            return self._approved(value)
        if isinstance(value, Repeated):
            return from_bytes(value.content)
        if isinstance(value, Ended):
            return ended_record(value.run)
        # Reached only by what a type checker would have refused.
        _refuse(value)
        assert_never(value)

    def _approved(self, value: Approved) -> RecordDict:
        if isinstance(value.value, ScoreCounts):
            what, content = "exact metrics", scores_record(value.site, value.value)
        else:
            what, content = (
                "update or histogram without a ledger, or NOT PRIVATE",
                _drawn(value.site, value.value),
            )
        if self._ledger is not None:
            self._ledger.outside(value.run, what=what, released=to_bytes(content), approval=value.approval)
        return content


def _drawn(
    site: str, value: tuple[Receipt, Arrays] | tuple[HistogramPlan, NDArray[np.float64]]
) -> RecordDict:
    first, second = value
    if isinstance(first, HistogramPlan) and isinstance(second, np.ndarray):
        return private_scores_record(site, first, second)
    if isinstance(first, Receipt) and isinstance(second, dict):
        return update_record(first, second)
    _refuse(value)
    raise AssertionError


def _refuse(value: object) -> None:
    raise PrivacyError(
        f"a {type(value).__name__} may not leave the site: it is neither charged for, nor approved, nor declared "
        "data-independent"
    )
