"""`fedmed privacy audit` as a person meets it."""

import json
import re
from pathlib import Path

import pytest

from tests.commands import Commands, heavy, light

SHORT = ("privacy", "audit", "--rounds=2", "--canaries=300", "--guesses=60")
# As noise that is drawn and not added.
BROKEN = (
    "import fedmed.privacy.audit as a; from dataclasses import replace\n"
    "good = a.train\n"
    "def bad(*args, plan, **rest):\n"
    "    return good(*args, plan=replace(plan, noise_multiplier=plan.noise_multiplier / 6), **rest)\n"
    "a.audit.__kwdefaults__['train'] = bad"
)
INTERRUPTED = (
    "import fedmed.privacy.audit as a, os, signal\n"
    "a.audit.__kwdefaults__['train'] = lambda *b, **c: os.kill(os.getpid(), signal.SIGINT)"
)


def test_correct_code_ends_with_0_and_the_warning(tmp_path: Path) -> None:
    ended = heavy()(*SHORT, "--epsilon=2", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.endswith("A low bound is not evidence of privacy.\n")
    for name in ("canaries", "variance", "counting", "coupled", "clipping"):
        assert re.search(rf"^  {name} +passed ", ended.out, re.MULTILINE), name
    assert not list(tmp_path.iterdir())


def test_json_is_one_object_with_every_claim() -> None:
    ended = heavy()(*SHORT, "--epsilon=1", "--epsilon=8", "--json")
    values = json.loads(ended.out)
    assert (ended.code, ended.err) == (0, "")
    assert values["caution"] == "A low bound is not evidence of privacy."
    assert values["result"] == "passed"
    assert [claim["asked_epsilon"] for claim in values["claims"]] == [1.0, 8.0]
    assert [claim["checks"][0]["result"] for claim in values["claims"]] == ["passed", "proves nothing"]
    assert all(claim["private_randomness"] and claim["passed"] for claim in values["claims"])


def test_a_claim_out_of_reach_is_said_to_prove_nothing() -> None:
    ended = heavy()(*SHORT, "--epsilon=8")
    assert ended.code == 0
    assert "canaries  proves nothing" in ended.out
    assert re.search(r"code without any noise would reach \d\.\d\d, less than the claim", ended.out)


def test_broken_code_ends_with_1_and_says_which_check_saw_it() -> None:
    ended = heavy()(*SHORT, "--epsilon=1", before=BROKEN)
    assert ended.code == 1
    assert re.search(r"^  canaries +failed .*\n.*sees", ended.out, re.MULTILINE)
    assert re.search(r"^  coupled +passed ", ended.out, re.MULTILINE)
    assert "A CHECK FAILED" in ended.out
    assert "A low bound is not evidence of privacy." in ended.out
    assert json.loads(heavy()(*SHORT, "--epsilon=1", "--json", before=BROKEN).out)["result"] == "failed"


def test_ctrl_c_is_one_line() -> None:
    ended = heavy()(*SHORT, before=INTERRUPTED)
    assert (ended.code, ended.out, ended.err) == (130, "", "error: interrupted; nothing was kept\n")


@pytest.fixture(name="commands", scope="module")
def light_commands() -> Commands:
    """Commands in a process that has not imported torch."""
    return light()


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("--epsilon=0", "--epsilon=0.0: expected 0.01 to 100"),
        ("--epsilon=nan", "--epsilon=nan: expected"),
        ("--epsilon=1 --epsilon=-1", "--epsilon=-1.0: expected"),
        ("--epsilon=x", "Invalid value for '--epsilon'"),
        ("--delta=1", "--delta=1.0: expected above 0, at most 0.01"),
        ("--canaries=10", "--canaries=10: expected 100 to 3000"),
        ("--guesses=201", "--guesses=201: expected an even number, at most --canaries=1000"),
        ("--canaries=100", "--guesses=200: expected an even number, at most --canaries=100"),
        ("--rounds=0", "--rounds=0: expected 1 to 1000"),
        ("--device=gpu", "--device=gpu: expected auto, cpu, cuda or cuda:N"),
        ("--sample-rate=1.5", "--sample-rate=1.5: expected 0 < rate <= 1"),
        ("file", "unexpected extra argument"),
    ],
)
def test_a_wrong_option_is_one_line_before_torch_loads(typed: str, says: str, commands: Commands) -> None:
    ended = commands("privacy", "audit", *typed.split())
    assert (ended.code, ended.out, ended.torch, ended.err.count("\n")) == (2, "", False, 1)
    assert says in ended.err


def test_examples_work() -> None:
    ended = light()("privacy", "audit", "--help")
    examples = re.findall(r"^ +fedmed (privacy audit.*?)(?: {2,}.*| > .*)?$", ended.out, re.MULTILINE)
    assert len(examples) == 4
    for example in examples:
        assert heavy()(*example.split(), "--rounds=2", "--canaries=100", "--guesses=20").code == 0, example
