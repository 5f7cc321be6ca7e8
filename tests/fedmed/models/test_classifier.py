"""The real loading path on a tiny BERT: what is trained, what travels, what is stored."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.data.sentences import synthetic_sentences
from fedmed.data.table import read_site
from fedmed.errors import ModelError
from fedmed.models.build import build
from fedmed.models.classifier import TextClassifier, select
from fedmed.models.loading import check_digest, locate
from fedmed.privacy import dpsgd
from fedmed.privacy.plan import make_plan
from fedmed.privacy.randomness import seeded
from fedmed.training import LocalData, train
from tests.conftest import sha256
from tests.fedmed.models.encoders import modernbert, moved, own_gradient

BASE = ["tracking=none"]


def config(*overrides: str) -> RunConfig:
    return compose([*BASE, *overrides])


def text(run: RunConfig) -> TextClassifier:
    model = build(run.task, run.model, run.adapter)
    assert isinstance(model, TextClassifier)
    return model


def test_only_the_adapter_travels(hf_overrides: list[str]) -> None:
    names = {
        kind: set(text(config(*hf_overrides, f"adapter={kind}", "adapter.last_blocks=2")).adapter())
        for kind in ("head", "lora", "ffa_lora", "full")
    }
    assert names["head"] == {"head.weight", "head.bias"}
    assert names["ffa_lora"] < names["lora"]
    assert not any("lora_A" in name for name in names["ffa_lora"])
    assert all("lora" in name or "head" in name for name in names["lora"])
    assert {name.split(".layer.")[1][0] for name in names["lora"] if ".layer." in name} == {"2", "3"}
    assert not any("embeddings" in name or "pooler" in name for name in names["full"])
    with_tables = text(config(*hf_overrides, "adapter=full", "adapter.embeddings=true")).adapter()
    assert any("word_embeddings" in name for name in with_tables)


@pytest.mark.parametrize("adapter", ["head", "lora", "ffa_lora", "full"])
def test_stored_states_give_the_logits_of_the_whole_forward(adapter: str, hf_overrides: list[str]) -> None:
    run = config(*hf_overrides, f"adapter={adapter}", "adapter.last_blocks=2", "model.synthetic_sentences=20")
    model = text(run)
    model.initialise(0)
    data = read_site(run.task, "Switzerland", seed=0)
    batch = model.prepare(data)
    rows = torch.arange(0, len(data.labels), 7)
    torch.nn.init.normal_(model.head.weight)
    model.eval()
    with torch.no_grad():
        stored = model(**select(batch, rows))
        whole = model(**select(model.tokenize(data.texts), rows))
    assert torch.allclose(stored, whole, atol=1e-5 if adapter == "head" else 0)


@pytest.mark.parametrize("adapter", ["head", "lora", "full"])
def test_a_site_without_a_record_is_prepared_like_any_other(adapter: str, hf_overrides: list[str]) -> None:
    run = config(*hf_overrides, f"adapter={adapter}", "adapter.last_blocks=2", "model.synthetic_sentences=20")
    data = read_site(run.task, "Switzerland", seed=0)
    empty = read_site(run.task, "nowhere", seed=0, key=b"k" * 32, maybe_empty=True)
    some, none = text(run).prepare(data), text(run).prepare(empty)
    assert none.keys() == some.keys()
    for name, tensor in none.items():
        assert (len(tensor), tensor.dtype, tensor.dim()) == (0, some[name].dtype, some[name].dim())


def test_the_seed_alone_decides_where_a_run_starts(hf_overrides: list[str]) -> None:
    model = text(config(*hf_overrides, "adapter=lora", "adapter.last_blocks=2"))
    first = model.initialise(0)
    for parameter in model.adapter().values():
        parameter.data.add_(1.0)
    again, other = model.initialise(0), model.initialise(1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    a = next(name for name in first if "lora_A" in name)
    assert not np.array_equal(first[a], other[a])
    assert all(not values.any() for name, values in first.items() if "lora_B" in name or "head" in name)


def test_the_frozen_a_of_ffa_lora_is_the_same_at_every_site(hf_overrides: list[str]) -> None:
    model = text(config(*hf_overrides, "adapter=ffa_lora", "adapter.last_blocks=2"))

    def frozen() -> list[torch.Tensor]:
        model.initialise(3)
        return [p.clone() for name, p in model.named_parameters() if "lora_A" in name]

    first = frozen()
    assert len(first) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, frozen(), strict=True))


def test_nothing_random_or_statistical_is_on_while_training(hf_overrides: list[str]) -> None:
    """Dropout would be a second source of randomness; here it is off because its modules stay in eval()."""
    model = text(config(*hf_overrides, "adapter=lora", "adapter.last_blocks=2"))
    model.training_mode()
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts
    assert not any(m.training for m in dropouts)
    assert any(m.training for m in model.modules())
    inputs = model.tokenize(["age 5, no pain", "old male, chest pain"])
    assert torch.equal(model(**inputs), model(**inputs))


def test_centring_comes_from_synthetic_sentences_and_scales_to_norm_one(hf_overrides: list[str]) -> None:
    whitened = ["model.synthetic_sentences=60", "model.components=8", "model.whitening=1.0"]
    run = config(*hf_overrides, *whitened, "adapter=head")
    model = text(run)
    rows = (model.pooled(synthetic_sentences(run.task, 60)) - model.mean) @ model.projection
    assert rows.shape[1] == 8
    assert torch.allclose(rows.mean(0), torch.zeros(8), atol=1e-4)
    assert (rows**2).sum(1).mean().item() == pytest.approx(1.0, rel=1e-3)
    deviations = rows.std(0)
    assert deviations.max() / deviations.min() < 1.01


def test_a_plain_head_gives_the_same_logits(hf_overrides: list[str]) -> None:
    model = text(config(*hf_overrides, "model.synthetic_sentences=60", "model.components=8", "adapter=head"))
    torch.nn.init.normal_(model.head.weight)
    pooled = model.pooled(["old male, chest pain", "young female"])
    weight, bias = model.plain_head()
    expected = model.head((pooled - model.mean) @ model.projection)
    assert torch.allclose(pooled @ weight.T + bias, expected, atol=1e-4)


def test_the_network_is_built_once_a_process(hf_overrides: list[str]) -> None:
    run = config(*hf_overrides)
    assert build(run.task, run.model, run.adapter) is build(run.task, run.model, run.adapter)


def test_another_digest_than_the_pinned_one_is_refused(hf_overrides: list[str]) -> None:
    run = config(*hf_overrides[:2], f"model.sha256={'0' * 64}")
    with pytest.raises(ModelError, match=r"model.sha256=000000000000….*has [0-9a-f]{64}"):
        check_digest(run.model, locate(run.model))


def test_a_folder_that_needs_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    run = config("model=hf", f"model.path={tmp_path}", f"model.sha256={'0' * 64}")
    with pytest.raises(ModelError, match=r"no model.safetensors.*pytorch_model.bin is not read: convert it"):
        locate(run.model)


def test_a_folder_without_tokenizer_or_of_unknown_kind_is_refused(tmp_path: Path, bert_folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((bert_folder / name).read_bytes())
    digest = sha256(tmp_path / "model.safetensors")
    run = config("model=hf", f"model.path={tmp_path}", f"model.sha256={digest}")
    with pytest.raises(ModelError, match="no tokenizer"):
        build(run.task, run.model, run.adapter)
    (tmp_path / "vocab.txt").write_bytes((bert_folder / "vocab.txt").read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ModelError, match="cannot load it"):
        build(run.task, run.model, run.adapter)


def test_a_package_that_is_not_installed_names_the_install_command() -> None:
    run = config("model=hf", "model.package=no_such_package:model", f"model.sha256={'0' * 64}")
    with pytest.raises(ModelError, match=r"pip install 'fedmed\[demo\]'"):
        locate(run.model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter=lora", "adapter.last_blocks=9"], "the encoder has 4 blocks"),
        (
            ["adapter=lora", "adapter.targets=[nothing]"],
            "no such layer; the blocks have dense, key, query, value",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_names_what_would(
    overrides: list[str], message: str, hf_overrides: list[str]
) -> None:
    run = config(*hf_overrides, *overrides)
    with pytest.raises(ModelError, match=message):
        build(run.task, run.model, run.adapter)


@pytest.mark.parametrize(("model", "arrays"), [("logistic", 2), ("mlp", 4)])
def test_tabular_models_train_everything_under_every_adapter_they_take(model: str, arrays: int) -> None:
    for adapter in ("head", "full"):
        run = config(f"model={model}", f"adapter={adapter}", "task=heart10")
        built = build(run.task, run.model, run.adapter)
        assert len(built.adapter()) == arrays
        assert built.initialise(0)["head.weight"].shape == (1, 32 if model == "mlp" else 14)


def test_sentences_keep_the_declared_order_of_columns(hf_overrides: list[str]) -> None:
    """The public constants must come from sentences written as the records are."""
    run = config(*hf_overrides, "model.synthetic_sentences=30", "adapter=head")
    model = text(run)
    assert list(run.task.columns)[:3] == ["age", "sex", "cp"]
    mean = model.pooled(synthetic_sentences(run.task, 30)).mean(0)
    assert torch.allclose(mean, model.mean, atol=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_modernbert_goes_through_the_text_path(adapter: str, tmp_path: Path) -> None:
    """Stored states with both kinds of attention, and a private step of the real training against autograd."""
    folder = modernbert(tmp_path / "modernbert")
    run = compose(
        ["model=hf", f"model.path={folder}", f"model.sha256={sha256(folder / 'model.safetensors')}", "tracking=none",
         f"adapter={adapter}", "adapter.last_blocks=1", "training.sample_rate=1", "training.learning_rate=1"]
    )  # fmt: skip
    model = build(run.task, run.model, run.adapter)
    site = read_site(run.task, "Switzerland", seed=0)
    stored = LocalData(model.prepare(site), torch.from_numpy(site.labels), [])
    assert ("state" in stored.batch) == (adapter == "lora")
    arrays = moved(model)
    records_of = [np.array([0]), np.array([1, 2]), np.array([3])]
    whole = LocalData({n: v for n, v in stored.batch.items() if n != "state"}, stored.labels, records_of)
    gradients = [own_gradient(model, whole, arrays, records) for records in records_of]
    norms = [float(np.sqrt(sum((g**2).sum() for g in gradient.values()))) for gradient in gradients]
    clip = float(np.median(norms))
    plan = dataclasses.replace(make_plan(run, "Switzerland"), max_grad_norm=clip, steps_per_round=1, sample_rate=1.0,
                               records_per_patient=3)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpsgd, "noised", lambda cells, _, grid: cells.double() * grid.cell)
        got = train(
            model, dataclasses.replace(stored, records_of=records_of), arrays, plan=plan, training=run.training,
            source=seeded(0),
        ).delta  # fmt: skip
    for name, values in got.items():
        clipped = [g[name] * min(1, clip / norm) for g, norm in zip(gradients, norms, strict=True)]
        assert np.abs(values + sum(clipped) / plan.expected_batch).max() < 1e-6, name
    assert max(np.abs(values).max() for values in got.values()) > 1e-4
