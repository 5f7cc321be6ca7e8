"""What a site answers: a quote from declared values alone, an update that no held-out record reaches, or no."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

import clients.site
from clients.client_app import app
from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.data.split import hash_split, site_key
from fedmed.errors import ConfigError
from fedmed.flower.in_process import InProcessGrid
from fedmed.models.build import build
from fedmed.privacy.histogram import HistogramPlan, metrics_plans
from fedmed.privacy.plan import PrivacyPlan, make_plan
from fedmed.records import (
    PROTOCOL,
    Arrays,
    Instruction,
    instruction_record,
    read_private_scores,
    read_quote,
    read_scores,
    read_update,
    scores_record,
)
from strategies.sites import Sites
from tests.conftest import count

SITE = "a"


def table_config(path: Path | str, *overrides: str) -> RunConfig:
    """A private run on a table with several records a patient, split by the site's own key."""
    return compose(
        ["task=csv", f"task.path={path}", "task.site_column=site", "task.label=sick", "task.patient_column=id",
         "task.declared_sizes={a: 60, b: 60}", "task.columns={age: {kind: numeric, low: 0, high: 100}}",
         "model=logistic", "tracking=none", "rounds=2", "training.sample_rate=0.5", "training.steps_per_round=3",
         *overrides]
    )  # fmt: skip


def instruction_of(config: RunConfig, round: int = 1) -> Instruction:
    plans = {site: make_plan(config, site) for site in config.task.declared_sizes}
    return Instruction.of(config, plans, run_id="r", round=round)


def ask(kind: str, content: RecordDict, partition: int = 0) -> Message:
    """The app's reply, as any Flower would get it."""
    InProcessGrid(app, nodes=2)
    context = Context(
        run_id=1, node_id=2, node_config={"partition-id": partition}, state=RecordDict(), run_config={}
    )
    reply: Message = app(message=Message(content, 2, kind), context=context)
    return reply


def start(config: RunConfig) -> Arrays:
    return build(config.task, config.model, config.adapter).initialise(config.seed)


Row = dict[str, str]


def rows() -> list[Row]:
    """Forty patients a site, one to three records each."""
    draws = np.random.default_rng(4)
    return [
        {
            "site": site,
            "id": f"{site}{patient}",
            "age": str(draws.integers(100)),
            "sick": str(draws.integers(2)),
        }
        for site in ("a", "b")
        for patient in range(40)
        for _ in range(1 + patient % 3)
    ]


def write(path: Path, records: list[Row]) -> Path:
    lines = ["site,id,age,sick", *(",".join(record.values()) for record in records)]
    path.write_text("\n".join(lines) + "\n")
    return path


def held_out(records: list[Row]) -> set[str]:
    """The patients of the site that its own key holds out."""
    names = list(dict.fromkeys(record["id"] for record in records if record["site"] == SITE))
    test = hash_split(names, fraction=0.34, key=site_key(SITE))
    assert 1 < test.sum() < len(test) - 1
    return {name for name, out in zip(names, test, strict=True) if out}


def update(path: Path, *overrides: str) -> Arrays:
    """The site's update of round 1 under a seeded source, so that two can be compared."""
    config = table_config(path, "privacy.seeded=true", *overrides)
    reply = ask(MessageType.TRAIN, instruction_record(instruction_of(config), start(config)))
    return read_update(reply.content)[1]


def same(left: Arrays, right: Arrays) -> bool:
    return {k: v.tobytes() for k, v in left.items()} == {k: v.tobytes() for k, v in right.items()}


def flipped(record: Row) -> Row:
    """The same patient with another age and the other outcome."""
    return record | {"age": str(99 - int(record["age"])), "sick": str(1 - int(record["sick"]))}


CHANGES: dict[str, Callable[[Row], list[Row]]] = {
    "other values": lambda record: [flipped(record)],
    "unusable values": lambda record: [record | {"age": "unreadable"}],
    "more records": lambda record: [record, flipped(record)],
    "gone": lambda _: [],
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", ["dp", "off"])
def test_what_a_site_holds_out_does_not_reach_its_update(name: str, kind: str, tmp_path: Path) -> None:
    """privacy.md, rule 7: whatever becomes of held-out patients' records, the update keeps every bit."""
    records, change = rows(), CHANGES[name]
    out = held_out(records)
    # A site without anything to test on does not train.
    kept = [min(out)] if name in ("gone", "unusable values") else []
    before = update(write(tmp_path / "before.csv", records), f"privacy={kind}")
    changed = [
        new for record in records for new in (change(record) if record["id"] in out - set(kept) else [record])
    ]
    assert changed != records
    assert same(update(write(tmp_path / "after.csv", changed), f"privacy={kind}"), before)
    # The same change of one training patient is seen: the comparison is not blind.
    victim = next(record["id"] for record in records if record["site"] == SITE and record["id"] not in out)
    trained = [flipped(record) if record["id"] == victim else record for record in records]
    assert not same(
        update(write(tmp_path / "trained.csv", trained), f"privacy={kind}", "training.sample_rate=1"),
        update(tmp_path / "before.csv", f"privacy={kind}", "training.sample_rate=1"),
    )


def test_an_update_carries_arrays_and_public_values_only(tmp_path: Path) -> None:
    """privacy.md, rules 5 and 19: declared size, not the count; no loss, no time, no memory."""
    config = table_config(write(tmp_path / "t.csv", rows()))
    reply = ask(
        MessageType.TRAIN, instruction_record(instruction_of(config, round=2), start(config)), partition=1
    )
    assert sorted(reply.content) == ["arrays", "receipt"]
    told = json.loads(str(reply.content.config_records["receipt"]["json"]))
    assert told == {"protocol": PROTOCOL, "site": "b", "round": 2, "declared_size": 40, "noise_draws": 3}
    _, delta = read_update(reply.content)
    assert {name: (v.shape, v.dtype) for name, v in delta.items()} == {
        name: (v.shape, np.dtype(np.float32)) for name, v in start(config).items()
    }
    assert all((values != 0).all() for values in delta.values())


def test_a_private_update_is_drawn_anew_each_time(tmp_path: Path) -> None:
    """privacy.md, rule 8: the same instruction, other noise."""
    config = table_config(write(tmp_path / "t.csv", rows()))
    content = instruction_record(instruction_of(config), start(config))
    updates = [read_update(ask(MessageType.TRAIN, content).content)[1] for _ in range(count(2, 20))]
    for index, one in enumerate(updates):
        assert not any(same(one, other) for other in updates[:index])


def test_an_evaluation_counts_the_held_out_records_and_says_that_it_is_exact(tmp_path: Path) -> None:
    records = rows()
    config = table_config(write(tmp_path / "t.csv", records))
    reply = ask(MessageType.EVALUATE, instruction_record(instruction_of(config), start(config)))
    site, counts = read_scores(reply.content)
    assert site == SITE
    out = held_out(records)
    tested = [record for record in records if record["id"] in out]
    assert counts.records == len(tested)
    assert counts.counts[1].sum() == sum(record["sick"] == "1" for record in tested)
    assert json.loads(str(reply.content.config_records["scores"]["json"]))["release"] == "exact"


PRIVATE = ("privacy.metrics=private", "privacy.metrics_epsilon=8", "task.declared_sizes={a: 600, b: 600}")


def evaluated(config: RunConfig, arrays: Arrays, *, run_id: str) -> Message:
    asked = dataclasses.replace(instruction_of(config), run_id=run_id)
    return ask(MessageType.EVALUATE, instruction_record(asked, arrays))


def test_a_private_evaluation_is_a_noisy_histogram_of_held_out_patients(tmp_path: Path) -> None:
    """privacy.md, rule 16: of patients, not of their records; drawn by the declared plan."""
    records = rows()
    config = table_config(write(tmp_path / "t.csv", records), *PRIVATE)
    reply = evaluated(config, start(config), run_id="private")
    site, plan, counts = read_private_scores(reply.content)
    assert site == SITE
    assert plan == metrics_plans(config.task, config.privacy)[SITE]
    assert plan.unit == "patient"
    assert not np.array_equal(counts, np.rint(counts))
    # Within five deviations of all 20 cells' noise: 14 patients could be, their 27 records too; so the true counts.
    assert abs(counts.sum() - len(held_out(records))) < 5 * plan.noise_multiplier * 20**0.5
    told = json.loads(str(reply.content.config_records["private_scores"]["json"]))
    assert told["release"] == "private"
    assert told.keys() == {"protocol", "site", "release", "plan"}


def noiseless(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HistogramPlan, "release", lambda _self, counts, _source: counts.astype(np.float64))


def test_each_held_out_patient_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts before noise; taking a patient with three records out changes one cell by one."""
    noiseless(monkeypatch)
    records = rows()
    out = held_out(records)
    config = table_config(write(tmp_path / "t.csv", records), *PRIVATE)
    arrays = {name: np.full_like(values, 0.3) for name, values in start(config).items()}
    whole = read_private_scores(evaluated(config, arrays, run_id="whole").content)[2]
    assert whole.sum() == len(out)
    victim = next(name for name in sorted(out) if sum(record["id"] == name for record in records) == 3)
    without = write(tmp_path / "t.csv", [record for record in records if record["id"] != victim])
    assert without
    less = read_private_scores(evaluated(config, arrays, run_id="without").content)[2]
    assert sorted(np.abs(whole - less).ravel()) == [0.0] * 19 + [1.0]


def drawn_once(config: RunConfig, run_id: str) -> bool:
    """Whether a site that is asked again for the metrics of a run sends the same bytes, and draws no more noise."""
    histograms = [
        read_private_scores(evaluated(config, start(config), run_id=run_id).content)[2] for _ in range(3)
    ]
    return all(histogram.tobytes() == histograms[0].tobytes() for histogram in histograms)


def test_a_noisy_result_is_never_redrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """privacy.md, rule 17: the mean of many draws would be the true count. A site that forgets is found out."""
    config = table_config(write(tmp_path / "t.csv", rows()), *PRIVATE)
    assert drawn_once(config, "kept")
    # Another adapter would be another release.
    other = {name: values + 1 for name, values in start(config).items()}
    with pytest.raises(ConfigError, match="another adapter of this run: once per run"):
        clients.site.private_score(dataclasses.replace(instruction_of(config), run_id="kept"), SITE, other)

    class Forgetful(dict):  # type: ignore[type-arg]
        def __contains__(self, key: object) -> bool:
            return False

    monkeypatch.setattr(clients.site, "_drawn", Forgetful())
    assert not drawn_once(config, "redrawn")


@pytest.mark.parametrize("metrics", ["private", "none"])
def test_a_site_gives_no_other_metrics_than_the_run_declares(metrics: str, tmp_path: Path) -> None:
    config = table_config(write(tmp_path / "t.csv", rows()), *PRIVATE, f"privacy.metrics={metrics}")
    with pytest.raises(ConfigError, match=f"privacy.metrics={metrics}: expected exact"):
        clients.site.score(instruction_of(config), SITE, start(config))
    exact = table_config(tmp_path / "t.csv")
    with pytest.raises(ConfigError, match="expected private for a histogram"):
        clients.site.private_score(instruction_of(exact), SITE, start(exact))


def test_a_quote_holds_the_metrics_and_refuses_those_that_are_worth_nothing(tmp_path: Path) -> None:
    config = table_config(tmp_path / "nowhere.csv", *PRIVATE)
    asked = instruction_of(config, round=0)
    epsilon = clients.site.quote(asked, SITE).epsilon
    assert epsilon is not None
    assert epsilon > 8
    poor = table_config(tmp_path / "nowhere.csv", "privacy.metrics=private")
    answer = read_quote(ask(MessageType.QUERY, instruction_record(instruction_of(poor, round=0))).content)
    assert answer.refusal is not None
    assert "expected error of the AUC" in answer.refusal


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening any table fails."""

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("data was opened")

    for name in ("clients.site.read_site", "fedmed.data.table.read_site", "fedmed.data.table.read_csv"):
        monkeypatch.setattr(name, opened)


@pytest.mark.usefixtures("no_data")
def test_a_quote_opens_no_data(tmp_path: Path) -> None:
    """There is no table, and no key of the site is made; the price is the site's own reckoning."""
    config = table_config("/nowhere/patients.csv")
    asked = instruction_of(config, round=0)
    for partition, site in enumerate(("a", "b")):
        quote = read_quote(ask(MessageType.QUERY, instruction_record(asked), partition).content)
        assert (quote.site, quote.declared_size, quote.refusal) == (site, 40, None)
        assert quote.epsilon == asked.plans[site].epsilon()
        assert 2.99 < quote.epsilon <= 3.0
    off = instruction_of(table_config("/nowhere/patients.csv", "privacy=off"), round=0)
    assert read_quote(ask(MessageType.QUERY, instruction_record(off)).content).epsilon is None
    assert not (tmp_path / "fedmed-home").exists()


def other_values(plan: PrivacyPlan) -> dict[str, object]:
    """For every field of a plan a value that would serve a coordinator which is not honest."""
    return {
        "unit": "record", "declared_size": plan.declared_size + 1, "sample_rate": 0.4, "records_per_patient": 2,
        "max_grad_norm": 2 * plan.max_grad_norm, "noise_multiplier": 0.99 * plan.noise_multiplier,
        "steps_per_round": plan.steps_per_round - 1, "rounds": plan.rounds + 1, "delta": 10 * plan.delta,
    }  # fmt: skip


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(PrivacyPlan)])
def test_no_field_of_a_plan_can_be_another_than_declared(name: str) -> None:
    """The quote refuses it and names it; a coordinator that asks for no quote gets no update either."""
    config = table_config("/nowhere/patients.csv")
    honest = instruction_of(config)
    plan = honest.plans[SITE]
    changes = other_values(plan)
    assert changes.keys() == {field.name for field in dataclasses.fields(PrivacyPlan)}
    tampered = {**honest.plans, SITE: dataclasses.replace(plan, **{name: changes[name]})}
    content = instruction_record(dataclasses.replace(honest, plans=tampered), start(config))
    refusal = read_quote(ask(MessageType.QUERY, content).content).refusal
    assert refusal is not None
    costly = name in ("noise_multiplier", "rounds")
    assert ("the run asked for 3.0" if costly else f"plans.a.{name}={changes[name]}: expected ") in refusal
    assert ask(MessageType.TRAIN, content).error.reason == "site-failed"


def test_a_refusal_ends_the_run_and_tells_why() -> None:
    config = table_config("/nowhere/patients.csv")
    asked = instruction_of(config, round=0)
    plan = dataclasses.replace(asked.plans["b"], noise_multiplier=0.9 * asked.plans["b"].noise_multiplier)
    asked = dataclasses.replace(asked, plans={**asked.plans, "b": plan})
    with pytest.raises(
        ConfigError, match=r"site 'b' refuses the run: plans\.b: costs epsilon .* asked for 3\.0"
    ):
        Sites(InProcessGrid(app, nodes=2), timeout=60).connect(asked)


def test_another_model_than_the_pinned_one_is_refused_by_name(hf_overrides: list[str]) -> None:
    """The site looks at its own copy: what the coordinator has checked on its machine proves nothing here."""
    config = table_config("/nowhere/patients.csv", *hf_overrides)
    pinned = config.model.sha256
    assert (
        read_quote(ask(MessageType.QUERY, instruction_record(instruction_of(config, 0))).content).refusal
        is None
    )
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, sha256="0" * 64))
    refusal = read_quote(ask(MessageType.QUERY, instruction_record(instruction_of(other, 0))).content).refusal
    assert refusal is not None
    assert refusal.startswith("model.sha256=000000000000")
    assert pinned in refusal


@pytest.mark.parametrize("protocol", [PROTOCOL + 1, 0, None, str(PROTOCOL)])
def test_another_protocol_version_gets_no_answer(protocol: object) -> None:
    config = table_config("/nowhere/patients.csv")
    content = instruction_record(instruction_of(config), start(config))
    values = json.loads(str(content.config_records["instruction"]["json"])) | {"protocol": protocol}
    content["instruction"] = ConfigRecord({"json": json.dumps(values)})
    for kind in (MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE):
        assert ask(kind, content).error.reason == "site-failed"


@pytest.mark.parametrize("partition", [-1, 2, 99])
def test_a_node_beyond_the_declared_sites_is_no_site(partition: int) -> None:
    config = table_config("/nowhere/patients.csv")
    content = instruction_record(instruction_of(config), start(config))
    for kind in (MessageType.QUERY, MessageType.TRAIN):
        assert ask(kind, content, partition).error.reason == "site-failed"


def test_whatever_fails_after_data_was_opened_looks_the_same(tmp_path: Path) -> None:
    """privacy.md, rule 19: no such table, no such site in it, nothing usable; one constant."""
    nobody = write(tmp_path / "nobody.csv", [record for record in rows() if record["site"] != SITE])
    broken = write(tmp_path / "broken.csv", [record | {"age": "?"} for record in rows()])
    replies = []
    for path in ("/nowhere/patients.csv", nobody, broken):
        config = table_config(path)
        replies.append(ask(MessageType.TRAIN, instruction_record(instruction_of(config), start(config))))
    assert len({(reply.error.code, reply.error.reason) for reply in replies}) == 1


def test_a_site_is_prepared_once_and_stays_warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second round reads no file."""
    config = table_config(write(tmp_path / "t.csv", rows()))
    content = instruction_record(instruction_of(config), start(config))
    assert ask(MessageType.TRAIN, content).has_content()
    assert ask(MessageType.EVALUATE, content).has_content()
    monkeypatch.setattr(clients.site, "read_site", None)
    assert ask(MessageType.TRAIN, content).has_content()
    assert ask(MessageType.EVALUATE, content).has_content()


def test_a_patient_who_was_taken_out_of_the_file_takes_part_no_more(tmp_path: Path) -> None:
    """A warm site sees that its file was replaced."""
    path = write(tmp_path / "t.csv", rows())
    config = table_config(path, "privacy=off", "training.sample_rate=1")
    content = instruction_record(instruction_of(config), start(config))

    def update() -> Arrays:
        return read_update(ask(MessageType.TRAIN, content).content)[1]

    before = update()
    assert np.array_equal(before["head.weight"], update()["head.weight"])
    out = held_out(rows())
    gone = next(row["id"] for row in rows() if row["site"] == SITE and row["id"] not in out)
    write(path, [record for record in rows() if record["id"] != gone])
    after = update()
    write(path, rows())
    restored = update()
    assert np.array_equal(before["head.weight"], restored["head.weight"])
    assert not np.array_equal(before["head.weight"], after["head.weight"])


def test_scores_of_a_site_survive_the_message() -> None:
    from fedmed.metrics import ScoreCounts

    counts = ScoreCounts.of(np.array([-1.0, 0.5, 3.0], np.float32), np.array([0, 1, 1], np.float32))
    site, read = read_scores(scores_record("St. Mary's", counts))
    assert site == "St. Mary's"
    assert np.array_equal(read.counts, counts.counts)
