"""The sites of a run as the coordinator sees them: names, not nodes; answers or reasons, not errors."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

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
    read_ended,
    read_head,
    read_private_scores,
    read_quote,
    read_scores,
    read_update,
)

log = logging.getLogger("fedmed.coordinator")
Answer = TypeVar("Answer")
# How often sites are asked whether a person has approved, in seconds.
APPROVAL_POLL = 1.0


@dataclass
class Traffic:
    """Bytes of arrays that went down to the sites and came up from them."""

    down: int = 0
    up: int = 0


@dataclass
class Sites:
    """Talks to the sites over a Grid.

    Attributes:
        timeout: seconds to wait for answers; whoever is later counts as absent from that round.
    """

    grid: Grid
    timeout: float
    nodes: dict[str, int] = field(default_factory=dict)
    # Called with a site's name, its ledger's head and the signature, for each reply from a site with a ledger.
    received: Callable[[str, str, str], None] = field(default=lambda _site, _head, _signature: None)

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
        replies, _ = self._ask(nodes, MessageType.QUERY, instruction_record(instruction), read_quote)
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
        self, instruction: Instruction, arrays: Arrays, sites: Iterable[str]
    ) -> tuple[dict[str, tuple[Receipt, Arrays]], Traffic]:
        """Send a round to some sites; the receipts and updates of those that answered in time."""
        return self._by_site(sites, MessageType.TRAIN, instruction_record(instruction, arrays), read_update)

    def evaluate(
        self, instruction: Instruction, arrays: Arrays, sites: Iterable[str]
    ) -> dict[str, ScoreCounts]:
        """Exact score counts of an adapter on the sites' held-out patients."""
        content = instruction_record(instruction, arrays)
        replies, _ = self._by_site(sites, MessageType.EVALUATE, content, read_scores)
        return {site: counts for site, (_, counts) in replies.items()}

    def end(self, instruction: Instruction) -> None:
        """Tell every site that the run is over, so that what it never used goes back to the budget."""
        content = instruction_record(instruction)
        self._by_site(self.nodes, f"{MessageType.QUERY}.end", content, read_ended)

    def evaluate_privately(
        self, instruction: Instruction, arrays: Arrays, plans: Mapping[str, HistogramPlan]
    ) -> dict[str, NoisyHistogram]:
        """Noisy histograms of an adapter's scores; one that was not drawn by its plan is dropped."""
        content = instruction_record(instruction, arrays)
        replies, _ = self._by_site(plans, MessageType.EVALUATE, content, read_private_scores)
        found = {}
        for site, (_, plan, counts) in replies.items():
            if plan == plans[site]:
                found[site] = NoisyHistogram(counts, plan.noise_multiplier, plan.edges)
            else:
                log.warning("%s drew its metrics by another plan than the run's; dropped", site)
        return found

    def _by_site(
        self, sites: Iterable[str], kind: str, content: RecordDict, read: Callable[[RecordDict], Answer]
    ) -> tuple[dict[str, Answer], Traffic]:
        names = {self.nodes[site]: site for site in sites}
        replies, traffic = self._ask(names, kind, content, read)
        return {names[node]: answer for node, answer in replies.items()}, traffic

    def _ask(
        self, nodes: Iterable[int], kind: str, content: RecordDict, read: Callable[[RecordDict], Answer]
    ) -> tuple[dict[int, Answer], Traffic]:
        targets = list(nodes)
        messages = [Message(content, node, kind) for node in targets]
        # An error about a dead node comes from the SuperLink: replies are matched by what they answer.
        sent: dict[str, int] = {}
        traffic = Traffic(down=array_bytes(content) * len(messages))
        answers: dict[int, Answer] = {}
        replies = list(self._exchange(messages, sent))
        for reply in replies:
            node = sent.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
            name = next((site for site, known in self.nodes.items() if known == node), f"node {node}")
            if reply.has_error():
                log.warning("%s failed in %s: %s", name, kind, reply.error.reason)
                continue
            traffic.up += array_bytes(reply.content)
            try:
                answer, head = read(reply.content), read_head(reply.content)
            # Whatever a site sends, parsers of JSON and arrays may raise anything: it must not end the run.
            except Exception as error:
                log.warning("%s sent an unreadable %s reply (%s); dropped", name, kind, type(error).__name__)
                continue
            answers[node] = answer
            if head is not None:
                # Before the first quote nobody knows which node is which site.
                self.received(answer.site if isinstance(answer, Quote) else name, *head)
        return answers, traffic

    def _exchange(self, messages: list[Message], sent: dict[str, int]) -> Iterable[Message]:
        replies = self.grid.send_and_receive(messages, timeout=self.timeout)
        sent.update({message.metadata.message_id: message.metadata.dst_node_id for message in messages})
        return replies

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
