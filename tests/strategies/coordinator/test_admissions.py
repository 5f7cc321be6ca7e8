"""Who is admitted is known before, during and after every run of the SuperLink."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedmed.errors import ConfigError
from fedmed.flower.line import LinkError
from strategies.coordinator.admissions import Admissions, reconcile


def key() -> bytes:
    return ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )  # fmt: skip


def public_file(folder: Path, name: str, content: bytes | None = None) -> Path:
    path = folder / "site.pub"
    path.write_bytes(f"# fedmed site: {name}\n".encode() + (content or key()))
    return path


@dataclass
class Node:
    node: int
    name: str
    public_key: bytes
    status: str = "registered"


@dataclass
class FakeControl:
    """Refuses what the real one refuses."""

    known: list[Node] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)

    def register(self, name: str, public_key: bytes) -> int:
        for node in self.nodes():
            # Flower takes no key twice, not even after it has left.
            if node.public_key == public_key or (node.status != "unregistered" and node.name == name):
                raise LinkError("in already")
        if name in self.refused:
            raise LinkError("in already")
        self.known.append(Node(len(self.known) + 1, name, public_key))
        return len(self.known)

    def unregister(self, node: int) -> None:
        self.known[node - 1].status = "unregistered"

    def nodes(self) -> list[Node]:
        return list(self.known)

    def standing(self) -> dict[str, bytes]:
        return {node.name: node.public_key for node in self.known if node.status != "unregistered"}


@pytest.fixture
def admissions(tmp_path: Path) -> Admissions:
    return Admissions(tmp_path)


def test_an_admission_lasts(admissions: Admissions, tmp_path: Path) -> None:
    pem = key()
    assert admissions.admit(public_file(tmp_path, "St. Mary's", pem)) == "St. Mary's"
    assert Admissions(tmp_path).read()["St. Mary's"].public_key.encode() == pem
    # Again is the same as once.
    before = admissions.read()
    admissions.admit(public_file(tmp_path, "St. Mary's", pem))
    assert admissions.read() == before
    admissions.expel("St. Mary's")
    assert Admissions(tmp_path).read() == {}
    # Under whatever name.
    with pytest.raises(ConfigError, match=r"its key was expelled, as 'St\. Mary's', which is for good"):
        admissions.admit(public_file(tmp_path, "other", pem))
    assert admissions.admit(public_file(tmp_path, "St. Mary's")) == "St. Mary's"


def test_a_name_and_a_key_are_one_site_s(admissions: Admissions, tmp_path: Path) -> None:
    pem = key()
    admissions.admit(public_file(tmp_path, "a", pem))
    with pytest.raises(
        ConfigError, match="admitted with another key; first run: fedmed coordinator expel 'a'"
    ):
        admissions.admit(public_file(tmp_path, "a"))
    with pytest.raises(ConfigError, match="site 'b': admitted with the same key as 'a'"):
        admissions.admit(public_file(tmp_path, "b", pem))
    assert list(admissions.read()) == ["a"]
    assert admissions.admit(public_file(tmp_path, "ignored"), "b") == "b"


def test_what_is_no_site_s_key_is_refused(admissions: Admissions, tmp_path: Path) -> None:
    private = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for content, expected in (
        (private, "a private key, which must not leave its site"), (b"x", "expected a P-384 public key"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=expected):
            admissions.admit(public_file(tmp_path, "a", content))
    with pytest.raises(ConfigError, match="names no site; add --name NAME"):
        admissions.admit(public_file(tmp_path, ""))
    with pytest.raises(ConfigError, match="cannot be read"):
        admissions.admit(tmp_path / "absent")
    with pytest.raises(ConfigError, match="site 'mercy': not admitted; no site is"):
        admissions.expel("mercy")
    admissions.admit(public_file(tmp_path, "mercy"))
    with pytest.raises(ConfigError, match="did you mean 'mercy'"):
        admissions.expel("mercyy")
    (tmp_path / "admitted.json").write_text("[1]")
    with pytest.raises(ConfigError, match="damaged"):
        admissions.read()


def test_the_superlink_is_told_exactly_what_changed(admissions: Admissions, tmp_path: Path) -> None:
    control, old, new = FakeControl(), key(), key()
    admissions.admit(public_file(tmp_path, "a", old))
    admissions.admit(public_file(tmp_path, "b"))
    assert reconcile(admissions.read(), control) == ["site 'a' is admitted", "site 'b' is admitted"]
    assert reconcile(admissions.read(), control) == []
    # One that it refuses keeps nobody out.
    admissions.admit(public_file(tmp_path, "c"))
    admissions.admit(public_file(tmp_path, "d"))
    control.refused.add("c")
    assert reconcile(admissions.read(), control) == [
        "site 'c' is not admitted by the SuperLink: in already", "site 'd' is admitted",
    ]  # fmt: skip
    control.refused.clear()
    admissions.expel("c")
    admissions.expel("d")
    assert reconcile(admissions.read(), control) == ["site 'd' is expelled"]
    # While it was down: one expelled, one with another key under its old name.
    admissions.expel("b")
    admissions.expel("a")
    admissions.admit(public_file(tmp_path, "a", new))
    said = reconcile(admissions.read(), control)
    assert said == ["site 'a' is expelled", "site 'b' is expelled", "site 'a' is admitted"]
    assert control.standing() == {"a": new}
    # The database of the SuperLink was lost: everyone is told again.
    fresh = FakeControl()
    reconcile(admissions.read(), fresh)
    assert fresh.standing() == {"a": new}
