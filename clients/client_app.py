"""The ClientApp: parses an instruction into checked values and hands it to the site's desk. Values in, values out."""

from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.guard import Desk, Guard, NoGuard
from clients.opened import open_guard
from clients.pause import Paused
from fedmed.errors import ConfigError
from fedmed.flower.in_process import constant_failure
from fedmed.flower.node import refused
from fedmed.privacy.release import Code
from fedmed.records import Instruction, read_instruction


def say_paused(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """A Flower mod: that the site is paused is a person's decision, which tells nothing about a record."""
    try:
        return call_next(message, context)
    except Paused:
        return refused(message, Code.PAUSED)


app = ClientApp(mods=[constant_failure, say_paused])


@app.query()
def query(message: Message, context: Context) -> Message:
    """Round 0: what would this run cost, by the site's own accounting? No data is opened."""
    instruction, _ = read_instruction(message.content)
    desk = _desk(context)
    return _reply(desk.quote(instruction, _site(instruction, context, desk)), message)


@app.query("end")
def end(message: Message, context: Context) -> Message:
    """The run is over: what it was promised and never used goes back."""
    instruction, _ = read_instruction(message.content)
    return _reply(_desk(context).end(instruction.run_id), message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training; the reply holds the adapter's change and public values."""
    instruction, arrays = read_instruction(message.content)
    desk = _desk(context)
    return _reply(
        desk.train(instruction, _site(instruction, context, desk), arrays, message.content), message
    )


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Scores of held-out patients, marked as what they are: a private histogram, or exact counts."""
    instruction, arrays = read_instruction(message.content)
    desk = _desk(context)
    return _reply(
        desk.evaluate(instruction, _site(instruction, context, desk), arrays, message.content), message
    )


def _desk(context: Context) -> Desk:
    """Of the site's own folder, where its node was started with one: the coordinator has no say in it."""
    folder = context.node_config.get("site-folder")
    return open_guard(str(folder)) if folder else NoGuard(str(context.node_config.get("device", "auto")))


def _site(instruction: Instruction, context: Context, desk: Desk) -> str:
    """The site that this node plays: its own, by its folder; in a simulation the partition-th declared one."""
    partition = int(context.node_config.get("partition-id", -1))
    if isinstance(desk, Guard) and partition < 0:
        return desk.folder.policy.name
    sites = list(instruction.task.declared_sizes)
    if not 0 <= partition < len(sites):
        raise ConfigError(f"partition-id={partition}: the task declares {len(sites)} sites")
    return sites[partition]


def _reply(content: RecordDict, message: Message) -> Message:
    return Message(content, reply_to=message)
