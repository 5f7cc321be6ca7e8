"""The operator's side of a SuperLink: runs and sites. For whoever may read the coordinator's secret."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from flwr.common.serde import user_config_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control.control_http_client import ControlHttpClient

from fedmed.errors import ConfigError
from fedmed.flower.bundle import make_bundle
from fedmed.flower.line import Line, LinkError

# Flower lists 20 runs where nothing is said.
MANY = 10_000


@dataclass(frozen=True)
class FlowerRun:
    """A run as Flower knows it.

    Attributes:
        status: pending, starting, running or finished.
        sub_status: completed, failed or stopped; empty before the end.
    """

    run: int
    status: str
    sub_status: str
    details: str
    overrides: str
    pending_at: str
    started_at: str
    finished_at: str


@dataclass(frozen=True)
class Node:
    """An admitted site.

    Attributes:
        public_key: in PEM.
        status: registered (never seen), online, offline or unregistered.
        last_seen: seconds since 1970 of the last sign of life, about; 0: none.
    """

    node: int
    name: str
    public_key: bytes
    status: str
    last_seen: float


class Control:
    """Asks a SuperLink.

    Args:
        address: HOST:PORT.
        ca: the coordinator's CA in PEM; None: not encrypted, for tests on loopback.
        secret: the bytes of the coordinator's control secret.

    Every method raises `LinkDown` where nobody answers, and `LinkError` for what is refused.
    """

    def __init__(self, address: str, *, ca: bytes | None, secret: bytes) -> None:
        self._line = Line(ControlHttpClient, address, ca=ca, component="flwr-cli", secret=secret.hex())

    def close(self) -> None:
        self._line.close()

    def start_run(self, overrides: Sequence[str]) -> int:
        """Start a run with these settings; its number."""
        content = make_bundle()
        values = user_config_to_proto({"overrides": shlex.join(overrides)})
        answer = self._line.call(
            "StartRun", StartRunRequest(fab=Fab(content=content), override_config=values)
        )
        if not answer.run_id:
            raise LinkError("the SuperLink did not start the run; its log says why")
        return int(answer.run_id)

    def stop_run(self, run: int) -> None:
        """Stop a run for good."""
        self._line.call("StopRun", StopRunRequest(run_id=run))

    def runs(self) -> list[FlowerRun]:
        """All runs, the oldest first."""
        found = self._line.call("ListRuns", ListRunsRequest(limit=MANY)).run_dict.values()
        return [
            FlowerRun(
                run=run.run_id,
                status=run.status.status,
                sub_status=run.status.sub_status,
                details=run.status.details,
                overrides=str(user_config_from_proto(run.override_config).get("overrides", "")),
                pending_at=run.pending_at,
                started_at=run.running_at,
                finished_at=run.finished_at,
            )
            for run in sorted(found, key=lambda run: run.pending_at)
        ]

    def register(self, name: str, public_key: bytes) -> int:
        """Admit a site under a name; its node's number.

        Raises:
            ConfigError: the name or the key is admitted already.
        """
        here = [node for node in self.nodes() if node.status != NodeStatus.UNREGISTERED]
        for node in here:
            if node.name == name or node.public_key == public_key:
                same = "the name" if node.name == name else "the key"
                raise ConfigError(f"site '{name}': {same} is admitted already, as '{node.name}'")
        request = RegisterNodeRequest(public_key=public_key, name=name)
        return int(self._line.call("RegisterNode", request).node_id)

    def unregister(self, node: int) -> None:
        """Expel a site."""
        self._line.call("UnregisterNode", UnregisterNodeRequest(node_id=node))

    def nodes(self) -> list[Node]:
        """All sites that were ever admitted."""
        found = self._line.call("ListNodes", ListNodesRequest()).nodes_info
        return [
            Node(
                node=node.node_id,
                name=node.name,
                public_key=node.public_key,
                status=node.status,
                last_seen=last_seen(node.online_until, node.heartbeat_interval, node.last_deactivated_at),
            )
            for node in found
        ]


def last_seen(online_until: float, interval: float, left_at: str) -> float:
    """When a node last gave a sign of life: Flower keeps until when it believes in the node, two intervals on."""
    left = datetime.fromisoformat(left_at).timestamp() if left_at else 0.0
    beat = online_until - 2 * interval if online_until else 0.0
    return left if left and left == online_until else max(beat, 0.0)
