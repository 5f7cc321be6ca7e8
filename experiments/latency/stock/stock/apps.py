"""Rounds through Flower as it comes: every site gets an array, works for a while, and sends one back."""

import json
import time
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Busy for as long as asked; says how long that was."""
    began = time.perf_counter()
    values = torch.from_numpy(message.content["arrays"]["w"].numpy().copy())  # type: ignore[union-attr]
    while time.perf_counter() - began < context.run_config["work"]:
        values = values * 1.0
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(values.numpy())}),
            "metrics": MetricRecord({"seconds": time.perf_counter() - began}),
        }
    )
    return Message(content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Write each round's seconds, and those of its slowest site, to a file."""
    values = np.random.default_rng(0).normal(size=int(context.run_config["size"])).astype(np.float32)
    nodes: list[int] = []
    while len(nodes) < context.run_config["nodes"]:
        nodes = list(grid.get_node_ids())
        time.sleep(0.2)
    rounds = []
    for _ in range(int(context.run_config["rounds"])):
        began = time.perf_counter()
        content = RecordDict({"arrays": ArrayRecord({"w": Array(values)})})
        messages = [Message(content, node, MessageType.TRAIN) for node in nodes]
        replies = list(grid.send_and_receive(messages))
        values = np.mean(
            [reply.content["arrays"]["w"].numpy() for reply in replies], axis=0, dtype=np.float32
        )
        slowest = max(float(reply.content["metrics"]["seconds"]) for reply in replies)
        rounds.append({"seconds": time.perf_counter() - began, "work": slowest})
    Path(str(context.run_config["output"])).write_text(json.dumps(rounds))
