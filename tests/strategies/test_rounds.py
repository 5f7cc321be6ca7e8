"""The loop over sites that fail, lie, dawdle or die: the others go on, or the run says what is missing."""

import contextlib
import copy
import io
import multiprocessing
import os
import signal
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedmed.errors import ConfigError, RunError
from fedmed.flower.in_process import InProcessGrid
from fedmed.metrics import CELLS, ScoreCounts
from fedmed.privacy.plan import make_plan
from fedmed.records import Arrays, Instruction, Receipt, read_update, scores_record, update_record
from strategies.folder import Progress
from strategies.members import Spent
from strategies.sites import Sites
from tests.strategies.apps import NAMES, Federation, Train, client_app, lying, mean_of, run_config, start
from tests.timing import PATIENCE


def changed(**changes: Callable[[np.ndarray], np.ndarray]) -> Train:
    def send(_: Instruction, good: Receipt, delta: Arrays) -> RecordDict:
        return update_record(
            good, {name: changes.get(name, np.copy)(values) for name, values in delta.items()}
        )

    return send


def receipt_text(text: object) -> Train:
    """A receipt that is not what a receipt is."""
    return lambda _, __, delta: RecordDict(
        {"receipt": ConfigRecord({"json": text}), "arrays": update_record(receipt(), delta)["arrays"]}  # type: ignore[dict-item]
    )


def receipt() -> Receipt:
    return Receipt(site="D", round=1, declared_size=99, noise_draws=0)


def array_bytes(data: bytes, stype: str = "numpy.ndarray") -> Train:
    """An array whose bytes the site made up."""

    def send(_: Instruction, good: Receipt, delta: Arrays) -> RecordDict:
        content = update_record(good, delta)
        arrays = OrderedDict(content.array_records["arrays"])
        arrays["w"] = Array(dtype="float32", shape=(3, 2), stype=stype, data=data)
        content["arrays"] = ArrayRecord(arrays)
        return content

    return send


def npy(header: str) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def zipped() -> bytes:
    """An .npz, which np.load opens as something that is no array."""
    buffer = io.BytesIO()
    np.savez(buffer, w=np.ones((3, 2), np.float32))
    return buffer.getvalue()


def empty_zip() -> bytes:
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    return buffer.getvalue()[:-4]


def fail(*_: object) -> RecordDict:
    raise RuntimeError("a record's value")


BAD: dict[str, tuple[Train, str]] = {
    "raises": (fail, "no answer"),
    "NaN": (changed(b=lambda v: v * np.nan), "non-finite"),
    "infinity": (changed(w=lambda v: v * np.inf), "non-finite"),
    "misshapen": (changed(w=lambda v: v.T), "misshapen"),
    "float64": (changed(w=lambda v: v.astype(np.float64)), "another type"),
    "misnamed": (lambda _, r, d: update_record(r, {"W": d["w"], "b": d["b"]}), "misnamed"),
    "no arrays": (lambda _, r, _d: update_record(r, {}), "misnamed"),
    "another round": (lambda _, r, d: update_record(lying(r, round=7), d), "an answer to round 7"),
    "inflated": (lambda _, r, d: update_record(lying(r, declared_size=10**9), d), "another declared size"),
    "noise of another run": (lambda _, r, d: update_record(lying(r, noise_draws=1), d), "1 noise draws instead of 0"),
    "too large": (changed(w=lambda v: v + 1e7), "above 1e+06 (strategy.norm_bound"),
    "no receipt": (lambda _, r, d: RecordDict({"arrays": update_record(r, d)["arrays"]}), "no answer"),
    "nothing": (lambda *_: RecordDict(), "no answer"),
    "not JSON": (receipt_text("{"), "no answer"),
    "a number": (receipt_text(5), "no answer"),
    "a list": (receipt_text("[]"), "no answer"),
    "a text": (receipt_text('"x"'), "no answer"),
    "deeply nested": (receipt_text("[" * 100_000), "no answer"),
    "another protocol": (receipt_text('{"protocol": 0}'), "no answer"),
    "fields missing": (receipt_text('{"protocol": 1}'), "no answer"),
    "a field of another type": (
        receipt_text('{"protocol": 1, "site": "D", "round": "1", "declared_size": 99, "noise_draws": 0}'),
        "no answer",
    ),
    "no bytes": (array_bytes(b""), "no answer"),
    "noise for bytes": (array_bytes(b"\x80\x04noise"), "no answer"),
    "half a file": (array_bytes(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), }")), "no answer"),
    "a header of a terabyte": (
        array_bytes(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }")),
        "no answer",
    ),
    "objects": (array_bytes(npy("{'descr': '|O', 'fortran_order': False, 'shape': (3, 2), }")), "no answer"),
    "an archive": (array_bytes(zipped()), "no answer"),
    "a broken archive": (array_bytes(empty_zip()), "no answer"),
    "another serialiser": (array_bytes(b"", stype="pickle"), "no answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_misbehaving_site_is_left_out_with_a_warning(name: str) -> None:
    """Through the real messages: the adapter is the mean of the other three, and the run goes on."""
    behaviour, reason = BAD[name]
    config = run_config("rounds=1", "strategy.norm_bound=1e6")
    with Federation(config, client_app({"D": behaviour})) as federation:
        progress = federation.run()
    for array, values in mean_of(1, 11, 21).items():
        np.testing.assert_allclose(progress.arrays[array], values, rtol=1e-6)
    assert len(federation.warnings) == 1
    assert federation.warnings[0].startswith("round 1: 'D' is left out: ")
    assert reason in federation.warnings[0]
    entry = progress.history[0]
    assert entry["sites"] == ["A", "B", "C"]
    assert list(entry["dropped"]) == ["D"]


BAD_SCORES: dict[str, Callable[[str], RecordDict]] = {
    "misshapen": lambda site: scores_record(site, ScoreCounts(np.zeros((2, 7), np.int64))),
    "negative": lambda site: scores_record(site, ScoreCounts(np.full((2, CELLS), -1))),
    "nothing": lambda _: RecordDict(),
    "raises": fail,
}


@pytest.mark.parametrize("name", BAD_SCORES)
def test_unusable_scores_are_left_out_and_spoil_no_round(name: str) -> None:
    with Federation(run_config("rounds=1"), client_app(evaluate={"B": BAD_SCORES[name]})) as federation:
        entry = federation.run().history[0]
    assert list(entry["site_metrics"]) == ["A", "C", "D"]
    assert entry["auc"] == 1.0
    assert entry["accuracy"] == 1.0


@pytest.mark.parametrize(("quorum", "bad"), [(0.5, 3), (0.75, 2), (1.0, 1), (0.01, 4)])
def test_fewer_good_replies_than_the_quorum_end_the_run(quorum: float, bad: int) -> None:
    """No adapter comes of them, and nothing counts the round as finished; at least one reply is always needed."""
    finished: list[Progress] = []
    app = client_app(dict.fromkeys(NAMES[:bad], fail))
    with Federation(run_config(f"federation.quorum={quorum}"), app) as federation:
        federation.loop.finished = finished.append
        needed = max(1, round(4 * quorum))
        message = (
            f"round 1: {4 - bad} good replies of 4 sites; federation.quorum={quorum:g} asks for {needed}"
        )
        with pytest.raises(RunError, match=message):
            federation.run()
    assert not finished


@pytest.mark.parametrize(("quorum", "bad"), [(0.5, 2), (0.75, 1), (1.0, 0), (0.01, 3)])
def test_as_many_good_replies_as_the_quorum_are_enough(quorum: float, bad: int) -> None:
    app = client_app(dict.fromkeys(NAMES[:bad], fail))
    with Federation(run_config(f"federation.quorum={quorum}"), app) as federation:
        assert federation.run().round == 3
    assert len(federation.warnings) == 3 * bad


def test_a_quorum_s_fraction_is_not_rounded_up_by_a_binary_hair() -> None:
    """0.28 of 25 sites is 7 sites, and 0.28 * 25 is 7.000000000000001."""
    assert 0.28 * 25 > 7
    names = tuple(f"s{index}" for index in range(25))
    config = run_config("federation.quorum=0.28", "rounds=1", names=names)
    with Federation(config, client_app(dict.fromkeys(names[:18], fail))) as federation:
        assert federation.run().round == 1
    with (
        Federation(config, client_app(dict.fromkeys(names[:19], fail))) as federation,
        pytest.raises(RunError),
    ):
        federation.run()


def run_or_none(federation: Federation) -> Progress | None:
    """The rounds; None where a busy machine let nobody answer in time."""
    with contextlib.suppress(RunError):
        return federation.run()
    return None


def test_who_is_later_than_the_time_out_counts_as_absent() -> None:
    """The hung site never answers; the round lasts as long as the time-out, and the quorum decides."""
    hang = multiprocessing.Event()

    def wait_for_ever(*_: object) -> RecordDict:
        hang.wait()
        raise AssertionError

    for timeout in PATIENCE:
        config = run_config(f"federation.timeout={timeout}", "federation.quorum=0.01", "rounds=1")
        with Federation(config, client_app({"C": wait_for_ever}), workers=4) as federation:
            federation.loop.score_rounds = False
            progress = run_or_none(federation)
        if progress and len(progress.history[0]["dropped"]) == 1:
            break
    assert progress is not None
    assert 0.8 * timeout < progress.seconds < timeout + 60
    assert progress.history[0]["dropped"] == {"C": "no answer"}
    np.testing.assert_allclose(progress.arrays["w"], np.float32(np.mean([1, 11, 31])), rtol=1e-6)


def test_one_process_keeps_to_the_time_out_as_many_do() -> None:
    """A reply that came too late is not used, and no site is begun after it."""
    begun: list[str] = []

    def slow(_: Instruction, good: Receipt, delta: Arrays) -> RecordDict:
        begun.append(good.site)
        # An event that nobody sets: a wait, not a guess about another process.
        multiprocessing.Event().wait(1.3 * timeout)
        return update_record(good, delta)

    for timeout in PATIENCE:
        begun.clear()
        config = run_config(f"federation.timeout={timeout}", "federation.quorum=0.25", "rounds=1")
        with Federation(config, client_app(dict.fromkeys("BCD", slow))) as federation:
            federation.loop.score_rounds = False
            progress = run_or_none(federation)
        if progress:
            break
    assert begun == ["B"]
    assert progress is not None
    assert progress.history[0]["sites"] == ["A"]


def test_a_late_reply_is_used_in_no_later_round() -> None:
    """C answers round 1 only once round 2 has begun; round 2 takes C's answer to round 2."""
    for timeout in PATIENCE:
        progress = _with_a_late_reply(timeout)
        if progress and len(progress.history[0]["sites"]) == 3:
            break
    assert progress is not None
    assert [entry["sites"] for entry in progress.history] == [["A", "B", "D"], ["A", "B", "C", "D"]]
    expected = np.mean([1, 11, 31]) + np.mean([2, 12, 22, 32])
    np.testing.assert_allclose(progress.arrays["w"], np.float32(expected), rtol=1e-6)


def _with_a_late_reply(timeout: float) -> Progress | None:
    release = multiprocessing.Event()

    def late(instruction: Instruction, good: Receipt, delta: Arrays) -> RecordDict:
        if instruction.round == 1:
            release.wait()
            # Not to be saved by the check of the round: the receipt claims to be the next one's.
            good = lying(good, round=2)
        return update_record(good, delta)

    config = run_config(f"federation.timeout={timeout}", "federation.quorum=0.01", "rounds=2")
    with Federation(config, client_app({"C": late}), workers=4) as federation:
        federation.loop.score_rounds = False

        def sent(number: int, _sites: object) -> None:
            if number == 2:
                federation.sites.timeout = 120
                release.set()

        federation.loop.sent = sent
        return run_or_none(federation)


def test_a_killed_worker_takes_its_sites_out_and_the_run_goes_on() -> None:
    """SIGKILL in the middle of round 2: its sites have no answer from then on, the quorum of the others does."""

    def die(instruction: Instruction, good: Receipt, delta: Arrays) -> RecordDict:
        if instruction.round == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return update_record(good, delta)

    with Federation(run_config(), client_app({"C": die}), workers=2) as federation:
        progress = federation.run()
    # Of two workers one plays A and C: A had answered by then, and is gone with it afterwards.
    answered = [entry["sites"] for entry in progress.history]
    assert answered == [["A", "B", "C", "D"], ["A", "B", "D"], ["B", "D"]]
    assert list(progress.history[2]["site_metrics"]) == ["B", "D"]
    assert any("round 2: 'C' is left out: no answer" in line for line in federation.warnings)


def test_every_worker_killed_is_an_error_not_a_result() -> None:
    def die(*_: object) -> RecordDict:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    with (
        Federation(run_config(), client_app(dict.fromkeys(NAMES, die)), workers=4) as federation,
        pytest.raises(RunError, match=r"0 good replies of 4 sites; federation.quorum=0.5 asks for 2"),
    ):
        federation.run()


class HeldUp(InProcessGrid):
    """Answers with what sites said to the round before, as if it had been held up on the way."""

    held: list[Message] | None = None

    def gather(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        now = list(super().gather(messages, timeout=timeout))
        before, self.held = self.held or now, now
        return iter(before)


def test_answers_to_the_round_before_are_not_taken_for_this_one_s() -> None:
    """Some Grids match replies to nodes, not to messages: the receipt's round tells."""
    with Federation(run_config(), client_app(), grid=HeldUp) as federation:
        federation.loop.score_rounds = False
        federation.grid.held = None
        with pytest.raises(RunError, match="round 2: 0 good replies"):
            federation.run()
    assert federation.warnings == [f"round 2: '{site}' is left out: an answer to round 1" for site in NAMES]


class Reversed(InProcessGrid):
    """The last node answers first, and the SuperLink adds that a node which is no longer there has died."""

    def gather(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        return reversed(list(super().gather(messages, timeout=timeout)))


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_the_order_of_arrival_changes_no_bit(strategy: str) -> None:
    adapters = []
    for grid in (InProcessGrid, Reversed):
        with Federation(run_config(f"strategy={strategy}"), client_app(), grid=grid) as federation:
            adapters.append(federation.run().arrays)
    assert {k: v.tobytes() for k, v in adapters[0].items()} == {
        k: v.tobytes() for k, v in adapters[1].items()
    }


class FromTheSuperLink(InProcessGrid):
    """Reports a dead node as Flower's SuperLink does: in a message of its own, from node 1."""

    def gather(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for reply in super().gather(messages, timeout=timeout):
            if reply.has_error():
                reply.metadata.__dict__["_src_node_id"] = 1
            yield reply


def test_an_error_from_the_superlink_is_put_down_to_the_site_that_it_is_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Federation(run_config("rounds=1"), client_app({"B": fail}), grid=FromTheSuperLink) as federation:
        progress = federation.run()
    assert progress.history[0]["dropped"] == {"B": "no answer"}
    assert "B failed in train: site-failed" in caplog.text


def test_a_round_is_announced_before_it_is_sent() -> None:
    """What counts the spent budget must last before any site hears of the round."""
    order: list[str] = []

    def note(instruction: Instruction, good: Receipt, delta: Arrays) -> RecordDict:
        order.append(f"trained {instruction.round}")
        return update_record(good, delta)

    with Federation(run_config("rounds=2"), client_app({"A": note})) as federation:
        federation.loop.sent = lambda number, _sites: order.append(f"sent {number}")
        federation.loop.finished = lambda progress: order.append(f"finished {progress.round}")
        federation.run()
    assert order == ["sent 1", "trained 1", "finished 1", "sent 2", "trained 2", "finished 2"]


def test_what_is_released_is_the_mean_of_the_last_adapters() -> None:
    with Federation(run_config("strategy.average_last=2"), client_app()) as federation:
        progress = federation.run()
        released = progress.released()
    after = np.cumsum([np.mean([n, 10 + n, 20 + n, 30 + n]) for n in (1, 2, 3)])
    assert len(progress.recent) == 2
    np.testing.assert_allclose(released["w"], np.float32(after[1:].mean()), rtol=1e-6)
    assert released["w"].dtype == np.float32


def test_a_round_s_epsilon_counts_rounds_that_were_interrupted() -> None:
    """privacy.md, rule 13: what was sent and never came back is spent."""
    config = run_config("privacy=dp", "rounds=4", "task.patient_column=p")
    with Federation(config, client_app()) as federation:
        federation.loop.spent = Spent(dict.fromkeys(NAMES, 2))
        entries = federation.run(until=2).history
    plan = make_plan(config, "A")
    assert [entry["epsilon"]["A"] for entry in entries] == [plan.epsilon(rounds=3), plan.epsilon(rounds=4)]


def test_two_nodes_cannot_both_be_one_site() -> None:
    """Nor can a node be a site that the run does not have."""
    for name in ("A", "elsewhere"):
        app = client_app(names={"D": name})
        with pytest.raises(ConfigError, match=name), Federation(run_config(), app):
            pass


def test_a_site_that_does_not_answer_at_the_start_is_named() -> None:
    app = client_app(names={"C": None})
    with pytest.raises(RunError, match="no answer from C within"), Federation(run_config(), app):
        pass


def test_too_few_nodes_are_an_error_after_the_time_out() -> None:
    config = run_config("federation.timeout=0.1")
    plans = {site: make_plan(config, site) for site in NAMES}
    sites = Sites(InProcessGrid(client_app(), nodes=3), config.federation.timeout)
    with pytest.raises(ConfigError, match=r"3 nodes for 4 sites.*num-supernodes=4"):
        sites.connect(Instruction.of(config, plans, run_id="x", round=0))


def test_bytes_are_those_of_the_arrays() -> None:
    with Federation(run_config("rounds=1"), client_app({"D": fail})) as federation:
        entry = federation.run().history[0]
    size = sum(len(Array(values).data) for values in start().values())
    assert entry["bytes_down"] == 4 * size
    assert entry["bytes_up"] == 3 * size


class Twice(InProcessGrid):
    """Every reply arrives twice, the second time with other numbers; and one that nobody asked for."""

    def gather(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for reply in super().gather(messages, timeout=timeout):
            yield reply
            again = copy.deepcopy(reply)
            if again.has_content() and "receipt" in again.content:
                receipt, delta = read_update(again.content)
                again.content = update_record(
                    receipt, {name: np.full_like(values, 7) for name, values in delta.items()}
                )
            yield again
            stray = copy.deepcopy(again)
            stray.metadata.__dict__["_reply_to_message_id"] = "0" * 32
            stray.metadata.__dict__["_src_node_id"] = 99
            yield stray


def test_a_second_reply_and_one_to_nothing_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with Federation(run_config(), client_app(), grid=Twice) as federation:
        progress = federation.run()
    with Federation(run_config(), client_app()) as federation:
        expected = federation.run()
    assert {k: v.tobytes() for k, v in progress.arrays.items()} == {
        k: v.tobytes() for k, v in expected.arrays.items()
    }
    assert [entry["sites"] for entry in progress.history] == [[*NAMES]] * 3
    # The round is over with the last reply: what comes after it is not looked at.
    assert caplog.text.count("a reply to nothing that was asked, or a second one; dropped") >= 3 * 6


class Plain(Grid):
    """No more than Flower promises of a Grid, as its simulation on Ray gives: all replies at once, at the end."""

    def __init__(self, app: ClientApp, *, nodes: int, workers: int = 1) -> None:
        self._inner = InProcessGrid(app, nodes=nodes, workers=workers)

    def set_run(self, run: object) -> None:
        self._inner.set_run(run)

    @property
    def run(self) -> object:
        return self._inner.run

    def create_message(self, *arguments: Any, **options: Any) -> Message:
        return self._inner.create_message(*arguments, **options)

    def get_node_ids(self) -> Iterable[int]:
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._inner.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._inner.send_and_receive(messages, timeout=timeout)

    def close(self) -> None:
        self._inner.close()


def test_a_grid_that_gives_all_replies_at_once_gives_the_same_bits() -> None:
    assert not hasattr(Plain, "gather")
    adapters = []
    for grid in (InProcessGrid, Plain):
        with Federation(run_config(), client_app({"B": fail}), grid=grid) as federation:
            progress = federation.run()
        assert [entry["dropped"] for entry in progress.history] == [{"B": "no answer"}] * 3
        adapters.append({name: values.tobytes() for name, values in progress.arrays.items()})
    assert adapters[0] == adapters[1]


def test_replies_that_wait_on_disk_give_the_same_bits(tmp_path: Path) -> None:
    """And nothing of them remains."""
    adapters = []
    for spool in (None, tmp_path / "replies"):
        with Federation(run_config("strategy=fedadam"), client_app()) as federation:
            federation.loop.spool = spool
            progress = federation.run()
        adapters.append({name: values.tobytes() for name, values in progress.arrays.items()})
    assert adapters[0] == adapters[1]
    assert not list(tmp_path.iterdir())
