"""The sites of a consortium as they come and go: admitted by name, online or not, ready once each agreed to the run."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import MessageType

from fedmed.errors import ConfigError, RunError
from fedmed.records import Instruction, Quote, instruction_record, read_quote
from strategies.sites import Question, Sites

# How often it is looked who is online, and how often a site that is not ready is asked again; seconds.
LOOK_EVERY = 0.2
ASK_EVERY = 1.0
# A site that does not answer a question at the start holds up those to others for so long.
ANSWER_WITHIN = 10.0
OFFLINE = "offline"


@dataclass
class Consortium:
    """Who takes part: `Members` of a run whose sites are somewhere else.

    A site takes part in a round if it is online and has agreed to the run. Others are asked beside the rounds.

    Attributes:
        quorum: how many sites a round needs.
        timeout: seconds to wait for the quorum before a round; and at the start, from the first answer, for the others.
        approval_timeout: seconds to wait at the start for people at the sites.
        objection: why a site's quote is not accepted, or None.
        say: shows a person one line.
    """

    sites: Sites
    launch: Instruction
    quorum: int
    timeout: float
    approval_timeout: float
    objection: Callable[[str, Quote], str | None]
    say: Callable[[str], None]
    ready: set[str] = field(default_factory=set)
    # Of each site what was last said of it.
    _said: dict[str, str] = field(default_factory=dict)
    # Why each site that has answered did not agree.
    _unready: dict[str, str] = field(default_factory=dict)
    _refusing: set[str] = field(default_factory=set)
    _absent: dict[str, str] = field(default_factory=dict)
    _asked: dict[str, float] = field(default_factory=dict)
    _heard: float | None = None
    _started: bool = False

    def __post_init__(self) -> None:
        # Nodes come back under other numbers: whoever is asked anything is looked up first.
        self.sites.look = self.look

    @property
    def declared(self) -> list[str]:
        """All sites of the run."""
        return list(self.launch.task.declared_sizes)

    def look(self) -> None:
        """See who is online, and say what has changed."""
        online: dict[str, int] = self.sites.grid.sites()
        self.sites.nodes = {site: online[site] for site in self.declared if site in online}
        for site in self.declared:
            was = self._said.get(site)
            if site not in online and was not in (None, OFFLINE):
                self._tell(site, OFFLINE, f"site '{site}' is offline")
            elif site in online and was == OFFLINE and site in self.ready:
                self._tell(site, "ready", f"site '{site}' is back")

    def _tell(self, site: str, state: str, line: str) -> None:
        if self._said.get(site) != state:
            self._said[site] = state
            self.say(line)

    def start(self) -> None:
        """Wait until every site is ready or refuses; or the quorum is, and the others have had their time.

        Raises:
            ConfigError: so many refuse that there can be no quorum.
            RunError: fewer than the quorum are ready in time.
        """
        began = time.monotonic()
        while True:
            self._ask()
            if len(self.declared) - len(self._refusing) < self.quorum:
                raise ConfigError(f"{self._short_of_quorum()}: {self._why_not()}")
            decided = self.ready | self._refusing >= {*self.declared}
            patience = max(self.timeout, self.approval_timeout) if self._waiting else self.timeout
            if len(self._here) >= self.quorum:
                if decided or self._over(self._heard, self.timeout):
                    break
            elif self._over(began, patience):
                raise RunError(f"{self._short_of_quorum()} after {patience:g} s: {self._why_not()}")
            time.sleep(LOOK_EVERY)
        for site, reason in self._others().items():
            if reason == OFFLINE:
                self._tell(site, OFFLINE, f"site '{site}' is offline; it can join later")
        self._started = True

    def present(self, round: int) -> list[str]:
        """Who is ready and online; fewer than the quorum are waited for.

        Raises:
            RunError: the time-out is over.
        """
        began = time.monotonic()
        self.look()
        while len(self._here) < self.quorum:
            if self._over(began, self.timeout):
                raise RunError(
                    f"round {round}: {self._short_of_quorum()} after {self.timeout:g} s: {self._why_not()}; resume the "
                    "run once they are back"
                )
            time.sleep(LOOK_EVERY)
            self._ask()
        self._absent = self._others()
        return self._here

    def absent(self) -> dict[str, str]:
        """Why the others were not asked to train, when those who are were chosen."""
        return self._absent

    def questions(self) -> list[Question]:
        """To each site that is online and not ready, now and then: its quote."""
        now = time.monotonic()
        content = instruction_record(self.launch)
        found = []
        for site, node in self.sites.nodes.items():
            if site not in self.ready and now - self._asked.get(site, -ASK_EVERY) >= ASK_EVERY:
                self._asked[site] = now
                found.append(Question(site, node, MessageType.QUERY, content, read_quote))
        return found

    def heard(self, site: str, quote: Quote) -> None:
        """Take in a site's quote: it is ready, waits for a person, or refuses."""
        self._heard = self._heard or time.monotonic()
        self._refusing.discard(site)
        refusal = quote.refusal
        if quote.site != site:
            refusal = "it answers under another name than it was admitted with"
        elif refusal is None and quote.waiting is None:
            refusal = self.objection(site, quote)
        if refusal is not None:
            self._refusing.add(site)
            self._unready[site] = f"refuses: {refusal}"
            self._tell(site, self._unready[site], f"site '{site}' refuses the run: {refusal}; it is left out")
        elif quote.waiting is not None:
            self._unready[site] = f"waits: {quote.waiting}"
            command = f"fedmed site approve DIR {self.launch.run_id}"
            self._tell(site, self._unready[site], f"site '{site}': {quote.waiting}: {command}")
        else:
            self.ready.add(site)
            self._tell(site, "ready", f"site '{site}' joins{' the next round' if self._started else ''}")

    def _ask(self) -> None:
        """Ask those who are not ready, and wait a little for their answers."""
        self.look()
        for question, quote in self.sites.ask(self.questions(), timeout=min(ANSWER_WITHIN, self.timeout)):
            if quote is not None:
                self.heard(question.site, quote)

    @property
    def _here(self) -> list[str]:
        return [site for site in self.declared if site in self.ready and site in self.sites.nodes]

    @property
    def _waiting(self) -> bool:
        return any(reason.startswith("waits") for reason in self._others().values())

    def _others(self) -> dict[str, str]:
        """Why each site that does not take part now does not."""
        here = set(self._here)
        return {
            site: self._unready.get(site, "has not agreed yet") if site in self.sites.nodes else OFFLINE
            for site in self.declared
            if site not in here
        }

    @staticmethod
    def _over(since: float | None, seconds: float) -> bool:
        return since is not None and time.monotonic() - since > seconds

    def _short_of_quorum(self) -> str:
        return f"{len(self._here)} of {len(self.declared)} sites are ready, the quorum is {self.quorum}"

    def _why_not(self) -> str:
        return "; ".join(f"'{site}': {reason}" for site, reason in self._others().items())
