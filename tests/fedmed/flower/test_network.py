"""A SuperLink process on loopback: what arrives, who is turned away, and what survives its death."""

import base64
import os
import threading
import time
import zipfile
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedmed.errors import ConfigError
from fedmed.flower import bundle, objects, site_link
from fedmed.flower.control import Control
from fedmed.flower.line import LinkDown, LinkError, LinkRefused
from fedmed.flower.server import NetworkGrid
from fedmed.flower.site_link import SiteLink
from tests.fedmed.flower.network import Network, new_key, pem_of, write_certificates

# FIPS 186-5, curve P-384.
P384_ORDER = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16
)
Work = Callable[[Message], Message]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    made = Network(tmp_path_factory.mktemp("network"))
    made.start()
    yield made
    made.end()


@pytest.fixture
def own_network(tmp_path: Path) -> Iterator[Network]:
    """One that the test may break."""
    made = Network(tmp_path)
    made.start()
    yield made
    made.end()


def echo(message: Message) -> Message:
    return Message(message.content, reply_to=message)


@contextmanager
def working(link: SiteLink, work: Work = echo) -> Iterator[None]:
    """A site that answers until the block ends."""
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                request = link.receive(0.5)
                if request is not None:
                    link.reply(request, work(request.message))
            except LinkDown:
                try:
                    link.connect()
                except LinkDown:
                    time.sleep(0.2)
            except LinkError:
                return

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def content(size: int, seed: int = 0) -> RecordDict:
    arrays = {f"w{n}": Array(np.random.default_rng(seed + n).normal(size=size)) for n in range(2)}
    return RecordDict({"arrays": ArrayRecord(arrays), "instruction": ConfigRecord({"json": "{}"})})


def sent(grid: NetworkGrid, names: list[str], what: RecordDict) -> list[Message]:
    here = grid.sites()
    return [Message(what, here[name], MessageType.TRAIN) for name in names]


@pytest.mark.parametrize("size", [10, 1_000_000], ids=["small", "large"])
def test_what_is_sent_arrives_and_what_is_answered_comes_back(network: Network, size: int) -> None:
    names = [f"a{size}", f"b{size}"]
    links = [network.site(name) for name in names]
    task = network.task("rounds=2", "name=a b")
    assert task.begin() == "rounds=2 'name=a b'"
    assert task.heartbeat()
    grid = network.grid(task)
    what = content(size)
    seen: list[RecordDict] = []

    def note(message: Message) -> Message:
        seen.append(message.content)
        return Message(content(size, seed=5), reply_to=message)

    with working(links[0], note), working(links[1], note):
        messages = sent(grid, names, what)
        replies = list(grid.gather(messages, timeout=60))
    assert seen == [what, what]
    assert [reply.content for reply in replies] == [content(size, seed=5)] * 2
    assert {r.metadata.reply_to_message_id for r in replies} == {m.metadata.message_id for m in messages}
    assert [message.content for message in messages] == [what, what]
    assert links[0].bundle(task.run) == bundle.installed()
    task.finish(ok=True, details="")
    control = network.control()
    ended = next(run for run in control.runs() if run.run == task.run)
    assert (ended.status, ended.sub_status, ended.overrides) == (
        "finished",
        "completed",
        "rounds=2 'name=a b'",
    )
    for link in links:
        link.close()


def test_replies_are_yielded_as_they_come(network: Network) -> None:
    quick, slow = network.site("quick"), network.site("slow")
    released = threading.Event()

    def wait(message: Message) -> Message:
        released.wait(60)
        return echo(message)

    task = network.task()
    task.begin()
    grid = network.grid(task)
    with working(quick), working(slow, wait):
        replies = grid.gather(sent(grid, ["quick", "slow"], content(10)), timeout=60)
        assert next(replies).metadata.src_node_id == grid.sites()["quick"]
        released.set()
        assert next(replies).metadata.src_node_id == grid.sites()["slow"]
        assert list(replies) == []
    task.finish(ok=True, details="")


def test_who_still_uploads_holds_up_nobody(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = network.site("uploaded"), network.site("uploading")
    task = network.task()
    task.begin()
    grid = network.grid(task)
    site, announced, released = threading.local(), threading.Event(), threading.Event()

    class Held(objects.Parcel):
        def send(self, lacking: Container[str], push: objects.Push, *, patience: float = 60.0) -> None:
            if getattr(site, "slow", False):
                announced.set()
                assert released.wait(60)
            super().send(lacking, push, patience=patience)

    def holds(message: Message) -> Message:
        site.slow = True
        return Message(content(80_000, seed=7), reply_to=message)

    def after_it(message: Message) -> Message:
        assert announced.wait(60)
        # Flower asks for no object again that another has announced.
        return Message(content(80_000, seed=5), reply_to=message)

    monkeypatch.setattr(site_link, "Parcel", Held)
    with working(slow, holds), working(quick, after_it):
        messages = sent(grid, ["uploading"], content(80_000)) + sent(grid, ["uploaded"], content(80_000))
        replies = grid.gather(messages, timeout=60)
        assert next(replies).metadata.src_node_id == grid.sites()["uploaded"]
        released.set()
        last = next(replies)
        assert last.metadata.src_node_id == grid.sites()["uploading"]
        assert last.content == content(80_000, seed=7)
        assert list(replies) == []
    task.finish(ok=True, details="")


@pytest.mark.parametrize("stored", [True, False], ids=["whose answer was lost", "that was not taken"])
def test_an_object_is_sent_again(stored: bool, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"again-{stored}"
    link = network.site(name)
    task = network.task()
    task.begin()
    grid = network.grid(task)
    once = threading.Lock()

    def push(client: FleetHttpClient, request: PushObjectRequest) -> PushObjectResponse:
        if not once.acquire(blocking=False):
            return take(client, request)
        if not stored:
            # As Flower answers when its database is locked.
            return PushObjectResponse(stored=False)
        take(client, request)
        raise httpx.ReadTimeout("the answer was lost")

    take = FleetHttpClient.PushObject
    monkeypatch.setattr(FleetHttpClient, "PushObject", push)
    answer = content(80_000, seed=40 + stored)
    with working(link, lambda message: Message(answer, reply_to=message)):
        (reply,) = grid.gather(sent(grid, [name], content(10)), timeout=60)
    assert once.locked()
    assert reply.content == answer
    task.finish(ok=True, details="")


@pytest.mark.parametrize("lost", ["root", "chunk"])
def test_a_reply_that_lacks_a_part_holds_up_nobody(
    lost: str, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, lacking = network.site(f"whole-{lost}"), network.site(f"lacking-{lost}")
    task = network.task()
    task.begin()
    grid = network.grid(task)
    site, announced = threading.local(), threading.Event()

    class Lacking(objects.Parcel):
        def send(self, lacking: Container[str], push: objects.Push, *, patience: float = 60.0) -> None:
            if getattr(site, "lacks", False):
                del self.objects[list(self.objects)[-1 if lost == "root" else 0]]
            super().send(lacking, push, patience=patience)
            announced.set()

    def lacks(message: Message) -> Message:
        site.lacks = True
        # What another test has sent is still there.
        return Message(content(80_000, seed=20 if lost == "root" else 30), reply_to=message)

    def after_it(message: Message) -> Message:
        assert announced.wait(60)
        return Message(content(80_000, seed=5), reply_to=message)

    monkeypatch.setattr(site_link, "Parcel", Lacking)
    with working(lacking, lacks), working(whole, after_it):
        names = [f"lacking-{lost}", f"whole-{lost}"]
        gathered = grid.gather(sent(grid, names, content(80_000)), timeout=60)
        # Without its root nobody knows whether it is still on its way.
        replies = [next(gathered)] if lost == "root" else list(gathered)
    assert [reply.content for reply in replies if reply.has_content()] == [content(80_000, seed=5)]
    assert [reply.error.reason for reply in replies if reply.has_error()] == ["unreadable"] * (lost != "root")
    task.finish(ok=True, details="")


def test_what_was_not_fetched_in_time_is_never_delivered(network: Network) -> None:
    """Nobody spends budget on a round that is over."""
    link = network.site("late")
    task = network.task()
    task.begin()
    grid = network.grid(task)
    began = time.monotonic()
    # Flower may say itself that nobody came for it.
    assert all(reply.has_error() for reply in grid.gather(sent(grid, ["late"], content(10)), timeout=1.0))
    assert time.monotonic() - began < 20
    assert link.receive(0.1) is None
    with working(link):
        (reply,) = grid.gather(sent(grid, ["late"], content(10)), timeout=60)
        assert reply.has_content()
    task.finish(ok=True, details="")


def test_a_damaged_reply_is_an_error_in_its_place(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    link = network.site("damaged")
    task = network.task()
    task.begin()
    grid = network.grid(task)

    class Damaged(objects.Parcel):
        @classmethod
        def of(cls, message: Message) -> objects.Parcel:
            parcel = objects.Parcel.of(message)
            parcel.proto.content.items[0].config_record.items[0].value.bytes = b"{no json"
            return parcel

    monkeypatch.setattr(site_link, "Parcel", Damaged)
    with working(link):
        (reply,) = grid.gather(sent(grid, ["damaged"], content(10)), timeout=60)
    assert reply.error.reason == "unreadable"
    link.close()
    task.finish(ok=True, details="")


def test_a_reply_that_swells_is_an_error_in_its_place(network: Network) -> None:
    """An array that names one piece a thousand times is small on the way, and large in memory."""
    link = network.site("swelling")
    task = network.task()
    task.begin()
    grid = network.grid(task)

    def swell(message: Message) -> Message:
        zeros = ArrayRecord({"w": Array(np.zeros(30_000_000))})
        return Message(RecordDict({"arrays": zeros}), reply_to=message)

    with working(link, swell):
        (reply,) = grid.gather(sent(grid, ["swelling"], content(10)), timeout=60)
    assert reply.error.reason == "unreadable"
    link.close()
    task.finish(ok=True, details="")


def test_an_unknown_site_and_an_expelled_one_are_refused_and_named_on_both_sides(network: Network) -> None:
    key = new_key()
    link = network.link("stranger", key)
    with pytest.raises(LinkRefused) as refused:
        link.connect()
    assert refused.value.reason == "unknown-node"
    assert "refused a site: unknown-node" in network.log
    control = network.control()
    node = control.register("stranger", pem_of(key))
    assert link.connect() == node
    assert link.receive(0.1) is None
    control.unregister(node)
    with pytest.raises(LinkRefused) as refused:
        link.receive(0.1)
    assert refused.value.reason == "expelled"
    assert "refused a site: expelled" in network.log
    with pytest.raises(LinkRefused) as refused:
        link.connect()
    assert refused.value.reason == "expelled"


def test_a_name_and_a_key_are_admitted_once(network: Network) -> None:
    control, key = network.control(), new_key()
    control.register("twin", pem_of(key))
    with pytest.raises(ConfigError, match="the name is admitted already"):
        control.register("twin", pem_of(new_key()))
    with pytest.raises(ConfigError, match="the key is admitted already, as 'twin'"):
        control.register("other", pem_of(key))
    assert [node.status for node in control.nodes() if node.name == "twin"] == ["registered"]


def test_only_who_knows_the_secret_operates_it(network: Network) -> None:
    wrong = Control(network.address, ca=network.ca, secret=b"guessed")
    for call in (wrong.nodes, wrong.runs, lambda: wrong.start_run([]), lambda: wrong.register("x", b"")):
        with pytest.raises(LinkError, match="403"):
            call()
    context = httpx.create_ssl_context(verify=str(network.folder / "ca.pem"))
    with httpx.Client(verify=context) as client:
        for path in ("/docs", "/openapi.json", "/v1/runtime/get-nodes", "/v1/control/list-runs", "/"):
            assert client.post(f"https://{network.address}{path}").status_code == 403, path
        assert client.get(f"https://{network.address}/health").status_code == 200
    assert "without the coordinator's secret" in network.log


def test_nobody_sends_more_than_a_site_ever_does(network: Network) -> None:
    context = httpx.create_ssl_context(verify=str(network.folder / "ca.pem"))
    address = f"https://{network.address}/v1/fleet/push-object"
    with httpx.Client(verify=context) as client:
        assert client.post(address, content=bytes(16_000_001)).status_code == 413
        assert client.post(address, content=iter([b"in pieces"])).status_code == 413
        assert client.post(address, content=b"").status_code == 415
    assert "of another size" in network.log


def test_a_request_that_is_sent_again_is_refused(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    link = network.site("replayed")
    requests: list[httpx.Request] = []
    send = httpx.Client.send

    def note(self: httpx.Client, request: httpx.Request, **rest: object) -> httpx.Response:
        if request.url.path == "/v1/fleet/pull-messages":
            requests.append(request)
        return send(self, request, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(httpx.Client, "send", note)
    assert link.receive(0.1) is None
    monkeypatch.undo()
    assert len(requests) == 1
    context = httpx.create_ssl_context(verify=str(network.folder / "ca.pem"))
    with httpx.Client(verify=context) as client:
        again = client.send(requests[0])
        assert (again.status_code, again.headers["fedmed-reason"]) == (401, "replayed")
        # The other signature of the same time that anybody can make of the first.
        name = "flwr-signature"
        first, second = decode_dss_signature(base64.b64decode(requests[0].headers[name]))
        other = base64.b64encode(encode_dss_signature(first, P384_ORDER - second)).decode()
        requests[0].headers[name] = other
        again = client.send(requests[0])
        assert (again.status_code, again.headers["fedmed-reason"]) == (401, "replayed")
        # Two of one header, of which two readers may take different ones.
        twice = [*requests[0].headers.multi_items(), (name, "AAAA")]
        again = client.post(requests[0].url, headers=twice, content=requests[0].content)
        assert again.status_code == 400
    assert "refused a site: replayed" in network.log
    link.close()


def test_another_ca_is_refused(tmp_path: Path, network: Network) -> None:
    (tmp_path / "other").mkdir()
    write_certificates(tmp_path / "other")
    other = (tmp_path / "other" / "ca.pem").read_bytes()
    link = SiteLink(network.address, key=new_key(), ca=other, node_file=tmp_path / "node")
    with pytest.raises(LinkRefused) as refused:
        link.connect()
    assert refused.value.reason == "wrong-ca"


def test_certificates_are_renewed_while_it_runs_and_an_expired_one_is_named(own_network: Network) -> None:
    link = own_network.site("a")
    assert link.receive(0.1) is None

    def renew(*, days: int) -> None:
        before = own_network.log.count("a new certificate is in use")
        write_certificates(own_network.folder, days=days)
        end = time.monotonic() + 30
        while own_network.log.count("a new certificate is in use") == before:
            assert time.monotonic() < end
            time.sleep(0.1)

    serial = own_network.served()
    renew(days=2)
    assert own_network.served() != serial
    assert link.receive(0.1) is None
    renew(days=-1)
    fresh = SiteLink(
        own_network.address, key=new_key(), ca=own_network.ca, node_file=own_network.folder / "fresh"
    )
    with pytest.raises(LinkRefused) as refused:
        fresh.connect()
    assert refused.value.reason == "certificate-expired"


def test_a_killed_site_takes_its_place_again_at_once(network: Network) -> None:
    key = new_key()
    node = network.control().register("killed", pem_of(key))
    first = network.link("killed", key)
    assert first.connect() == node
    # Nothing of the first says goodbye.
    first._stop.set()
    second = network.link("killed", key)
    began = time.monotonic()
    assert second.connect() == node
    assert time.monotonic() - began < 10


def test_a_run_goes_on_when_its_superlink_is_killed_and_started_again(own_network: Network) -> None:
    link = own_network.site("a")
    task = own_network.task()
    task.begin()
    grid = own_network.grid(task)
    with working(link):
        assert len(list(grid.gather(sent(grid, ["a"], content(10)), timeout=60))) == 1
        own_network.kill()
        own_network.start()
        assert task.heartbeat()
        end = time.monotonic() + 60
        while not list(grid.gather(sent(grid, ["a"], content(10)), timeout=5)):
            assert time.monotonic() < end
    task.finish(ok=True, details="")
    assert own_network.control().runs()[0].sub_status == "completed"


def test_a_stopped_run_is_told_so(network: Network) -> None:
    task = network.task()
    task.begin()
    control = network.control()
    control.stop_run(task.run)
    with pytest.raises(LinkError):
        assert task.heartbeat()
    assert next(run for run in control.runs() if run.run == task.run).sub_status == "stopped"


def archive(**files: str) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, text in files.items():
            made.writestr(name.replace("__", "."), text)
    return file.getvalue()


def test_a_bundle_is_read_and_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = bundle.read_bundle(bundle.make_bundle())
    assert own == bundle.installed()
    assert {Path(name).suffix for name in own.files} <= {".toml", ".md", ""}
    assert os.listdir() == []


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", archive(), archive(pyproject__toml="= nothing"), archive(pyproject__toml="[project]\nname = 'x'"),
     archive(pyproject__toml="#" * 10_000_000)],
)  # fmt: skip
def test_what_is_no_bundle_is_refused(content: bytes) -> None:
    with pytest.raises(LinkError, match="cannot be read"):
        bundle.read_bundle(content)
