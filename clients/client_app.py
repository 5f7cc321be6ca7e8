"""The ClientApp: parses an instruction into checked values, does one round, answers. Values in, values out."""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients import site as local_site
from fedmed.errors import ConfigError, FedmedError
from fedmed.flower import constant_failure
from fedmed.records import (
    Instruction,
    Quote,
    Receipt,
    private_scores_record,
    quote_record,
    read_instruction,
    scores_record,
    update_record,
)

app = ClientApp(mods=[constant_failure])


@app.query()
def query(message: Message, context: Context) -> Message:
    """Round 0: what would this run cost, by the site's own accounting? No data is opened."""
    instruction, _ = read_instruction(message.content)
    site = _site(instruction, context)
    try:
        answer = local_site.quote(instruction, site)
    except FedmedError as error:
        # Declared values only have been read so far: the message can tell nothing about a record.
        answer = Quote(site=site, declared_size=0, epsilon=None, refusal=str(error))
    return _reply(quote_record(answer), message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training; the reply holds the adapter's change and public values."""
    instruction, arrays = read_instruction(message.content)
    site = _site(instruction, context)
    update = local_site.work(instruction, site, arrays)
    receipt = Receipt(
        site=site,
        round=instruction.round,
        declared_size=instruction.task.declared_train(site),
        noise_draws=update.noise_draws,
    )
    return _reply(update_record(receipt, update.delta), message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Scores of held-out patients, marked as what they are: a private histogram, or exact counts."""
    instruction, arrays = read_instruction(message.content)
    site = _site(instruction, context)
    if instruction.privacy.metrics == "private":
        plan, histogram = local_site.private_score(instruction, site, arrays)
        return _reply(private_scores_record(site, plan, histogram), message)
    return _reply(scores_record(site, local_site.score(instruction, site, arrays)), message)


def _site(instruction: Instruction, context: Context) -> str:
    """The site that this node plays: the partition-th declared one."""
    sites = list(instruction.task.declared_sizes)
    partition = int(context.node_config.get("partition-id", -1))
    if not 0 <= partition < len(sites):
        raise ConfigError(f"partition-id={partition}: the task declares {len(sites)} sites")
    return sites[partition]


def _reply(content: RecordDict, message: Message) -> Message:
    return Message(content, reply_to=message)
