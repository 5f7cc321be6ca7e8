"""Runs that wait for somebody to execute them, and what their processes say of themselves."""

from typing import Any

from flwr.common.constant import SubStatus
from flwr.common.serde import user_config_from_proto
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from fedmed.flower.gate import HOLD_HEADER
from fedmed.flower.line import Headers, Line

# A SuperLink that is started again is back within this many seconds.
PATIENCE = 120.0
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


class Tasks:
    """Runs that wait for somebody to execute them.

    Args:
        secret: the bytes of the coordinator's control secret.
        executor_secret: the bytes of its executor secret.
        hold: seconds that `acquire` may wait for a task (20 at most).
    """

    def __init__(
        self, address: str, *, ca: bytes | None, secret: bytes, executor_secret: bytes, hold: float = 2.0
    ) -> None:
        self._address, self._ca, self._secret = address, ca, secret
        sign = SuperExecAuthHttpInterceptor(
            master_secret=executor_secret, protected_methods=frozenset({ACQUIRE})
        )
        self._line = Line(
            RuntimeHttpClient,
            address,
            ca=ca,
            component="SuperExec",
            secret=secret.hex(),
            interceptors=(Headers(**{HOLD_HEADER: str(hold)}), sign),
        )

    def acquire(self) -> "Task | None":
        """The next run to execute, or None.

        Raises:
            LinkDown: no SuperLink answers.
        """
        answer = self._line.call(
            "AcquireTask", AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        )
        if not (answer.HasField("task") and answer.token):
            return None
        return Task(self._address, self._ca, self._secret, token=answer.token, run=answer.task.run_id)

    def close(self) -> None:
        self._line.close()


class Task:
    """A run that this process has taken on.

    Attributes:
        token: what the run's own process proves its right with.
        run: the run's number.
    """

    def __init__(self, address: str, ca: bytes | None, secret: bytes, *, token: str, run: int) -> None:
        self.token, self.run = token, run
        self._line = runtime_line(address, ca, secret, token)

    def begin(self) -> str:
        """Mark the run as running; its settings."""
        answer = self._line.call("PullTaskInput", PullTaskInputRequest(), patience=PATIENCE)
        return str(user_config_from_proto(answer.run.override_config).get("overrides", ""))

    def heartbeat(self) -> bool:
        """Say that the run goes on; False: somebody has stopped it."""
        return bool(self._line.call("SendTaskHeartbeat", SendTaskHeartbeatRequest()).success)

    def finish(self, *, ok: bool, details: str) -> None:
        """Say how the run ended."""
        status = SubStatus.COMPLETED if ok else SubStatus.FAILED
        request = PushTaskOutputRequest(sub_status=status, details=details)
        self._line.call("PushTaskOutput", request, patience=PATIENCE)
        self._line.close()


def runtime_line(address: str, ca: bytes | None, secret: bytes, token: str, *interceptors: Any) -> Line:
    """A line of a run's own process: its token proves its right."""
    return Line(
        RuntimeHttpClient,
        address,
        ca=ca,
        component="flwr-serverapp",
        secret=secret.hex(),
        interceptors=(*interceptors, RuntimeTokenHttpInterceptor(token)),
    )
