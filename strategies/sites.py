"""The sites of a run as the coordinator sees them: names, not nodes; answers or reasons, not errors."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedmed.errors import ConfigError, RunError
from fedmed.metrics import ScoreCounts
from fedmed.privacy.histogram import HistogramPlan
from fedmed.private_metrics import NoisyHistogram
from fedmed.records import (
    Arrays,
    Instruction,
    Quote,
    Receipt,
    array_bytes,
    instruction_record,
    read_drawn,
    read_ended,
    read_head,
    read_private_scores,
    read_quote,
    read_scores,
    read_update,
)

log = logging.getLogger("fedmed.coordinator")
# How often sites are asked whether a person has approved, in seconds.
APPROVAL_POLL = 1.0


@dataclass
class Traffic:
    """Bytes of arrays that went down to the sites and came up from them."""

    down: int = 0
    up: int = 0


@dataclass(frozen=True)
class Question:
    """A message to a site, and how its answer is read. Before the first quote nobody knows which node is which site."""

    site: str
    node: int
    kind: str
    content: RecordDict
    read: Callable[[RecordDict], Any]


@dataclass
class Sites:
    """Talks to the sites over a Grid.

    Attributes:
        timeout: seconds to wait for answers; whoever is later counts as absent from that round.
        nodes: the node of each site.
        received: called with a site's name, its ledger's head and the signature, for each reply from a site with a
            ledger.
        drawn: called with a site's name and how many of the run's rounds its ledger was charged for.
        look: called before anybody is asked: `nodes` may change.
    """

    grid: Grid
    timeout: float
    nodes: dict[str, int] = field(default_factory=dict)
    received: Callable[[str, str, str], None] = field(default=lambda _site, _head, _signature: None)
    drawn: Callable[[str, int], None] = field(default=lambda _site, _rounds: None)
    look: Callable[[], None] = field(default=lambda: None)

    def connect(
        self,
        instruction: Instruction,
        *,
        approval_timeout: float = 0.0,
        waits: Callable[[dict[str, str]], None] = lambda _reasons: None,
    ) -> dict[str, Quote]:
        """Wait for enough nodes, ask each for a quote, and learn which node is which site.

        Where people at the sites have to approve the run first, ask again until they have.

        Args:
            approval_timeout: seconds to wait for them.
            waits: called once with each waiting site's reason.

        Raises:
            ConfigError: a site refuses, or there are fewer nodes than sites, or nobody approved in time.
        """
        end = time.monotonic() + approval_timeout
        quotes = self._quotes(instruction)
        waiting = {site: quote.waiting for site, quote in quotes.items() if quote.waiting}
        if waiting and approval_timeout:
            waits(waiting)
        while waiting:
            if time.monotonic() > end:
                reasons = "; ".join(f"site '{site}': {reason}" for site, reason in sorted(waiting.items()))
                raise ConfigError(
                    f"{reasons}: fedmed site approve DIR {instruction.run_id}; nobody did in time"
                )
            time.sleep(APPROVAL_POLL)
            quotes = self._quotes(instruction)
            waiting = {site: quote.waiting for site, quote in quotes.items() if quote.waiting}
        return quotes

    def _quotes(self, instruction: Instruction) -> dict[str, Quote]:
        wanted = set(instruction.task.declared_sizes)
        nodes = self._wait_for_nodes(len(wanted))
        content = instruction_record(instruction)
        questions = [Question("", node, MessageType.QUERY, content, read_quote) for node in nodes]
        answers = self._ask(questions, Traffic())
        replies = {question.node: quote for question, quote in answers if quote is not None}
        for node, quote in replies.items():
            # First all of them: whoever has promised something must be told if the run does not start.
            self.nodes.setdefault(quote.site, node)
        quotes: dict[str, Quote] = {}
        for node, quote in replies.items():
            if quote.refusal is not None:
                raise ConfigError(f"site '{quote.site}' refuses the run: {quote.refusal}")
            if quote.site not in wanted or self.nodes[quote.site] != node:
                raise ConfigError(
                    f"two nodes say that they are site '{quote.site}', or the run has no such site"
                )
            quotes[quote.site] = quote
        missing = wanted - quotes.keys()
        if missing:
            raise RunError(
                f"no answer from {', '.join(sorted(missing))} within {self.timeout:g} s; is the site online?"
            )
        return quotes

    def train(
        self,
        content: RecordDict,
        sites: Iterable[str],
        traffic: Traffic,
        *,
        beside: Iterable[Question] = (),
        heard: Callable[[str, Any], None] = lambda _site, _answer: None,
    ) -> Iterator[tuple[str, tuple[Receipt, Arrays] | None]]:
        """Send a round to some sites: each one's receipt and update as they come, None where they are unusable.

        Whoever does not answer in time does not come. At most one update is held here, and only until the next is
        asked for.

        Args:
            beside: questions to others, which go out with the round and do not hold it up; `heard` gets the answers.
        """
        train = self._questions(sites, MessageType.TRAIN, content, read_update)
        left = len(train)
        if not train:
            return
        # First, since on a Grid that calls one node after the other nobody would get to them otherwise.
        for question, answer in self._ask([*beside, *train], traffic):
            if question.kind == MessageType.TRAIN:
                left -= 1
                yield question.site, answer
            elif answer is not None:
                heard(question.site, answer)
            del answer
            if not left:
                return

    def evaluate(
        self, instruction: Instruction, arrays: Arrays, sites: Iterable[str]
    ) -> dict[str, ScoreCounts]:
        """Exact score counts of an adapter on the sites' held-out patients."""
        content = instruction_record(instruction, arrays)
        replies = self._by_site(sites, MessageType.EVALUATE, content, read_scores)
        return {site: counts for site, (_, counts) in replies.items()}

    def end(self, instruction: Instruction) -> set[str]:
        """Tell every site that the run is over, so that what it never used goes back to the budget; who has heard."""
        content = instruction_record(instruction)
        self.look()
        return {*self._by_site([*self.nodes], f"{MessageType.QUERY}.end", content, read_ended)}

    def evaluate_privately(
        self, instruction: Instruction, arrays: Arrays, plans: Mapping[str, HistogramPlan]
    ) -> dict[str, NoisyHistogram]:
        """Noisy histograms of an adapter's scores; one that was not drawn by its plan is dropped."""
        content = instruction_record(instruction, arrays)
        replies = self._by_site(plans, MessageType.EVALUATE, content, read_private_scores)
        found = {}
        for site, (_, plan, counts) in replies.items():
            if plan == plans[site]:
                found[site] = NoisyHistogram(counts, plan.noise_multiplier, plan.edges)
            else:
                log.warning("%s drew its metrics by another plan than the run's; dropped", site)
        return found

    def ask(self, questions: Sequence[Question], *, timeout: float) -> Iterator[tuple[Question, Any]]:
        """Each question once it is answered, with the answer; None where that is an error or unreadable."""
        return self._ask(questions, Traffic(), timeout)

    def _questions(
        self, sites: Iterable[str], kind: str, content: RecordDict, read: Callable[[RecordDict], Any]
    ) -> list[Question]:
        self.look()
        return [Question(site, self.nodes[site], kind, content, read) for site in sites if site in self.nodes]

    def _by_site(
        self, sites: Iterable[str], kind: str, content: RecordDict, read: Callable[[RecordDict], Any]
    ) -> dict[str, Any]:
        answers = self._ask(self._questions(sites, kind, content, read), Traffic())
        return {question.site: answer for question, answer in answers if answer is not None}

    def _ask(
        self, questions: Sequence[Question], traffic: Traffic, timeout: float | None = None
    ) -> Iterator[tuple[Question, Any]]:
        if not questions:
            return
        messages = [Message(question.content, question.node, question.kind) for question in questions]
        traffic.down += sum(array_bytes(question.content) for question in questions)
        left = dict(enumerate(questions))
        for reply in self._gather(messages, self.timeout if timeout is None else timeout):
            index = _answered(reply, messages, left)
            if index is None:
                log.warning("a reply to nothing that was asked, or a second one; dropped")
                continue
            question = left.pop(index)
            answer = self._read(question, reply, traffic)
            # Views of the reply's bytes, or copies: the one is enough.
            del reply
            yield question, answer
            del answer

    def _gather(self, messages: list[Message], timeout: float) -> Iterator[Message]:
        """The replies as they come, where the Grid can tell; else all of them at the end."""
        gather = getattr(self.grid, "gather", None)
        if gather is not None:
            return iter(gather(messages, timeout=timeout))
        return iter(self.grid.send_and_receive(messages, timeout=timeout))

    def _read(self, question: Question, reply: Message, traffic: Traffic) -> Any:
        name = question.site or f"node {question.node}"
        if reply.has_error():
            log.warning("%s failed in %s: %s", name, question.kind, reply.error.reason)
            return None
        traffic.up += array_bytes(reply.content)
        try:
            answer, head = question.read(reply.content), read_head(reply.content)
            drawn = read_drawn(reply.content)
        # Whatever a site sends, parsers of JSON and arrays may raise anything: it must not end the run.
        except Exception as error:
            kind = type(error).__name__
            log.warning("%s sent an unreadable %s reply (%s); dropped", name, question.kind, kind)
            return None
        site = question.site or (answer.site if isinstance(answer, Quote) else name)
        if head is not None:
            self.received(site, *head)
        if drawn is not None:
            self.drawn(site, drawn)
        return answer

    def _wait_for_nodes(self, count: int) -> list[int]:
        end = time.monotonic() + self.timeout
        while True:
            nodes = sorted(self.grid.get_node_ids())
            if len(nodes) >= count:
                return nodes[:count]
            if time.monotonic() > end:
                raise ConfigError(
                    f"{len(nodes)} nodes for {count} sites; with Flower's simulation: "
                    f"flwr run . --federation-config 'num-supernodes={count}'"
                )
            time.sleep(0.2)


def _answered(reply: Message, messages: Sequence[Message], left: Mapping[int, Question]) -> int | None:
    """Which open question a reply answers: by the message's id, since an error about a dead node comes from the
    SuperLink; else, of Grids that match replies to nodes, by the node."""
    for index, message in enumerate(messages):
        if message.metadata.message_id == reply.metadata.reply_to_message_id:
            return index if index in left else None
    node = reply.metadata.src_node_id
    return next((index for index, question in left.items() if question.node == node), None)
