"""What a site's own process does with a message besides receiving it: calls the ClientApp, or refuses."""

from collections.abc import Mapping

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedmed.flower.in_process import constant_failure
from fedmed.privacy.release import Code


def answered(
    app: ClientApp, message: Message, *, run: int, node: int, node_config: Mapping[str, str]
) -> Message:
    """The reply of an installed ClientApp; whatever fails inside is one constant.

    The app gets no run config: what a coordinator wants stands in the message, and is checked there.
    """
    context = Context(
        run_id=run, node_id=node, node_config=dict(node_config), state=RecordDict(), run_config={}
    )
    return constant_failure(message, context, lambda m, c: app(message=m, context=c))


def refused(message: Message, code: Code) -> Message:
    """A reply that says one constant, and nothing else."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, Code(code).value), reply_to=message)
