"""The ServerApp: composes a run from its overrides and does it. The same app runs in process and in Flower."""

import shlex

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmed.compose import compose
from strategies.run import run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what `--run-config 'overrides="rounds=5 privacy.epsilon=1"'` describes."""
    run(compose(shlex.split(str(context.run_config.get("overrides", "")))), grid)
