"""The real loading path on a tiny encoder of each family: what is trained, what travels, what is stored."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmed.compose import compose
from fedmed.config import RunConfig
from fedmed.data.images import read_site
from fedmed.errors import ModelError
from fedmed.models.build import build
from fedmed.models.classifier import select
from fedmed.models.image_classifier import ImageClassifier
from fedmed.privacy import dpsgd
from fedmed.privacy.dpsgd import check_sound
from fedmed.privacy.plan import make_plan
from fedmed.privacy.randomness import seeded
from fedmed.training import LocalData, logits, set_adapter, train
from tests.clients.sites import run
from tests.evidence import some
from tests.fedmed.models.encoders import FAMILIES, image_encoder, image_overrides, moved, own_gradient
from tests.stores import hospital

ADAPTERS = ("head", "lora", "ffa_lora", "full")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with an encoder of each family."""
    parent = tmp_path_factory.mktemp("encoders")
    return {family: image_encoder(parent / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hospitals' images."""
    parent = tmp_path_factory.mktemp("data")
    for seed, site in enumerate("ab"):
        hospital(parent / site, patients=24, name=site, seed=seed)
    return parent


def network(config: RunConfig) -> ImageClassifier:
    model = build(config.task, config.model, config.adapter)
    assert isinstance(model, ImageClassifier)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_adapter_travels(family: str, folders: dict[str, Path]) -> None:
    names = {}
    for kind in ADAPTERS:
        model = network(compose(image_overrides(folders[family], family, "nowhere", f"adapter={kind}")))
        names[kind] = set(model.adapter())
        assert not any("text_model" in name for name, _ in model.named_parameters())
        model.training_mode()
        check_sound(model)
    assert names["head"] == {"head.weight", "head.bias"}
    assert names["ffa_lora"] < names["lora"]
    assert all("lora" in name or name.startswith("head.") for name in names["lora"])
    # Of three blocks the last two, of ConvNeXt's stages of 1, 2 and 1 layers the last two of all.
    blocks = {name.split(".lora")[0].rpartition(".")[0] for name in names["lora"] if "lora" in name}
    last = ("stages.1.layers.1", "stages.2.layers.0") if "convnext" in family else (".1.", ".2.")
    assert all(any(part in f"{block}." for part in last) for block in blocks)
    assert all(any(part in f"{block}." for block in blocks) for part in last)
    assert not any("embeddings" in name or "probe" in name for name in names["full"])
    # What the features do not read would be trained on noise alone.
    assert not any("pooler" in name or "mask_token" in name for name in names["full"])
    assert any("post_layernorm" in name for name in names["full"]) == (family == "siglip")


# Each family with each adapter (in `make test` a third of these: each family, each adapter); a few with several slices.
CASES = some([(family, adapter, 1) for family in FAMILIES for adapter in ADAPTERS], 3) + [
    (family, adapter, 3) for family in ("dinov2", "convnext") for adapter in ("head", "lora", "full")
]


@pytest.mark.parametrize(("family", "adapter", "slices"), CASES)
def test_what_is_stored_gives_the_logits_of_the_whole_forward(
    family: str, adapter: str, slices: int, folders: dict[str, Path], data: Path
) -> None:
    config = compose(
        image_overrides(folders[family], family, data, f"adapter={adapter}", f"task.slices={slices}")
    )
    model = network(config)
    arrays = moved(model)
    site = read_site(config.task, "a", seed=0)
    batch = model.prepare(site)
    assert set(batch) == {{"head": "features", "full": "images"}.get(adapter, "state")}
    set_adapter(model, arrays)
    model.eval()
    rows = torch.arange(0, len(site.labels), 5)
    with torch.no_grad():
        stored = model(**select(batch, rows))
        whole = model(images=model.preprocessor.cut(torch.from_numpy(site.images[rows])))
    assert stored.std() > 1e-4
    assert torch.allclose(stored, whole, atol=1e-5 if adapter == "head" else 1e-6)
    # A record by itself is, to the last bit, what is stored of it.
    alone = model.prepare(dataclasses.replace(site, images=site.images[5:6]))
    assert all(torch.equal(alone[name], tensor[5:6]) for name, tensor in batch.items())
    # And one site without a usable record is prepared like any other.
    none = model.prepare(dataclasses.replace(site, images=site.images[:0]))
    assert {n: (v.shape[1:], v.dtype) for n, v in none.items()} == {
        n: (v.shape[1:], v.dtype) for n, v in batch.items()
    }
    assert all(len(tensor) == 0 for tensor in none.values())
    nothing = LocalData(none, torch.zeros(0), [])
    assert logits(model, nothing, arrays).shape == (0,)


def test_a_state_is_entered_exactly(folders: dict[str, Path], data: Path) -> None:
    """Of the same images in the same batch the difference is 0.0."""
    for family in FAMILIES:
        config = compose(image_overrides(folders[family], family, data))
        model = network(config)
        set_adapter(model, moved(model))
        model.eval()
        image = model.preprocessor.cut(torch.from_numpy(read_site(config.task, "a", seed=0).images[:1]))
        with torch.no_grad():
            assert torch.equal(model(state=model._state(image)), model(images=image)), family


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_are_averaged_as_features(family: str, folders: dict[str, Path]) -> None:
    model = network(compose(image_overrides(folders[family], family, "nowhere", "model.feature_norm=3")))
    model.eval()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = [model._pool(model.encoder(**model._inputs(images[:, [index]]))) for index in range(3)]
        features = model._features(images, None)
    mean = torch.stack(own).mean(dim=0)
    assert torch.allclose(features, 3 * mean / mean.norm(dim=1, keepdim=True), atol=1e-5)
    assert torch.allclose(features.norm(dim=1), torch.tensor(3.0))


COUNTS = [1, 3, 2, 1, 3, 3]


@pytest.mark.parametrize(("family", "adapter", "slices"), CASES)
def test_a_step_is_the_clipped_mean_gradient_of_one_patient_at_a_time(
    family: str, adapter: str, slices: int, folders: dict[str, Path], data: Path
) -> None:
    """`train` from stored tensors against plain autograd, from the pixels, on one patient's images."""
    config = compose(
        image_overrides(
            folders[family], family, data, f"adapter={adapter}", f"task.slices={slices}", "training.sample_rate=1",
            "training.steps_per_round=1", "training.learning_rate=1", "training.physical_batch_size=5",
        )
    )  # fmt: skip
    model = network(config)
    site = read_site(config.task, "a", seed=0)
    ends = np.cumsum(COUNTS)
    records_of = [np.arange(end - count, end) for count, end in zip(COUNTS, ends, strict=True)]
    few = dataclasses.replace(site, images=site.images[: ends[-1]])
    labels = torch.from_numpy(site.labels[: ends[-1]])
    assert 0 < labels.mean() < 1
    stored = LocalData(model.prepare(few), labels, records_of)
    whole = LocalData({"images": model.preprocessor.cut(torch.from_numpy(few.images))}, labels, records_of)
    arrays = moved(model)
    gradients = [own_gradient(model, whole, arrays, records) for records in records_of]
    norms = [float(np.sqrt(sum((g**2).sum() for g in gradient.values()))) for gradient in gradients]
    plan = dataclasses.replace(make_plan(config, "a"), max_grad_norm=float(np.median(norms)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpsgd, "noised", lambda cells, _, grid: cells.double() * grid.cell)
        got = train(model, stored, arrays, plan=plan, training=config.training, source=seeded(0)).delta
    largest = 0.0
    for name, values in got.items():
        clipped = [
            g[name] * min(1, plan.max_grad_norm / norm) for g, norm in zip(gradients, norms, strict=True)
        ]
        expected = -sum(clipped) / plan.expected_batch
        assert np.abs(values - expected).max() < 1e-5 * max(1.0, plan.max_grad_norm), name
        largest = max(largest, np.abs(expected).max())
    assert largest > 1e-3
    # The deliberately broken variant: each image its own patient.
    apart = dataclasses.replace(stored, records_of=[np.array([row]) for row in range(int(ends[-1]))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpsgd, "noised", lambda cells, _, grid: cells.double() * grid.cell)
        wrong = train(model, apart, arrays, plan=plan, training=config.training, source=seeded(0)).delta
    assert max(np.abs(wrong[name] - got[name]).max() for name in got) > 1e-3


def test_lora_goes_where_the_model_says_and_the_adapter_stands_above_it(folders: dict[str, Path]) -> None:
    def layers(*overrides: str) -> set[str]:
        model = network(compose(image_overrides(folders["dinov2"], "dinov2", "nowhere", *overrides)))
        return {name.split(".lora")[0].rpartition(".")[2] for name in model.adapter() if "lora" in name}

    assert layers() == {"q_proj", "v_proj"}
    assert layers(r"model.lora_targets='mlp\.fc1|mlp\.fc2'") == {"fc1", "fc2"}
    assert layers(r"model.lora_targets='(q|k|v)_proj'") == {"q_proj", "k_proj", "v_proj"}
    assert layers("model.lora_targets=fc1", "adapter.targets=[o_proj]") == {"o_proj"}
    with pytest.raises(
        ModelError, match=r"model\.lora_targets=query: no such layer; the blocks have fc1, fc2, k_proj"
    ):
        layers("model.lora_targets=query")


POOLINGS = [
    ("vit", "mean"),
    ("dinov2_with_registers", "mean"),
    ("siglip", "mean"),
    ("convnext", "mean"),
    ("clip", "pooler"),
    ("dinov3_vit", "pooler"),
]


@pytest.mark.parametrize(("family", "pooling"), POOLINGS)
def test_other_poolings(family: str, pooling: str, folders: dict[str, Path]) -> None:
    model = network(compose(image_overrides(folders[family], family, "nowhere", f"model.pooling={pooling}")))
    model.eval()
    image = torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        output = model.encoder(**model._inputs(image))
        pooled = model._pool(output)
    if pooling == "pooler":
        assert torch.equal(pooled, output.pooler_output)
        assert pooled.std() > 0.1
    else:
        # 16 patches behind the class token and the registers; of a ConvNeXt one place.
        tokens = output.last_hidden_state
        patches = tokens.flatten(2).transpose(1, 2) if tokens.dim() == 4 else tokens[:, -16:]
        assert torch.allclose(pooled, patches.mean(dim=1), atol=1e-6)


def test_what_an_encoder_does_not_have_is_refused(folders: dict[str, Path]) -> None:
    for family, pooling, message in (
        ("siglip", "cls", r"model\.pooling=cls: a 'siglip_vision_model' encoder has mean or pooler"),
        ("convnext", "cls", r"model\.pooling=cls: a 'convnext' encoder has mean or pooler"),
        ("vit", "pooler", r"model\.pooling=pooler: a 'vit' encoder has cls or mean"),
    ):
        with pytest.raises(ModelError, match=message):
            network(compose(image_overrides(folders[family], family, "nowhere", f"model.pooling={pooling}")))
    tables = ["adapter=full", "adapter.embeddings=true"]
    for family in FAMILIES.keys() - {"vit"}:
        with pytest.raises(ModelError, match=r"adapter\.embeddings=true: expected false"):
            network(compose(image_overrides(folders[family], family, "nowhere", *tables)))
    at_its_own_size = network(compose(image_overrides(folders["vit"], "vit", "nowhere", *tables)))
    assert any("position_embeddings" in name for name in at_its_own_size.adapter())
    with pytest.raises(ModelError, match=r"at 32 pixels no rule"):
        network(compose(image_overrides(folders["vit"], "vit", "nowhere", "model.image_size=32", *tables)))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_reads_images_of_another_size(family: str, folders: dict[str, Path], data: Path) -> None:
    config = compose(image_overrides(folders[family], family, data, "model.image_size=32"))
    model = network(config)
    assert model.size == (32, 32)
    set_adapter(model, moved(model))
    batch = model.prepare(read_site(config.task, "a", seed=0))
    with torch.no_grad():
        assert torch.isfinite(model(**batch)).all()
    if family not in ("convnext", "convnextv2"):
        assert batch["state"].shape[2] == 64 + model._leading


def test_a_size_that_an_encoder_cannot_read_is_refused(tmp_path: Path) -> None:
    import transformers as t

    torch.manual_seed(0)
    t.ConvNextModel(
        t.ConvNextConfig(hidden_sizes=[8, 8, 8, 8, 8], depths=[1] * 5, num_stages=5)
    ).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 16}}'
    )
    with pytest.raises(ModelError, match=r"model\.image_size=0: the encoder cannot read images of 16 x 16"):
        network(compose(image_overrides(tmp_path, "convnext")))


RUNS = [
    (
        "siglip",
        ["adapter=head", "model.image_size=32"],
        "image_size=20: images are enlarged to the 32 pixels",
    ),
    ("dinov2", ["adapter=lora"], ""),
    ("convnext", ["adapter=full"], ""),
]


@pytest.mark.parametrize(("family", "more", "warning"), RUNS, ids=[family for family, *_ in RUNS])
@pytest.mark.usefixtures("no_report")
def test_a_federated_run_end_to_end(
    family: str, more: list[str], warning: str, folders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """Ingested images, two sites, privacy, a card and an adapter at the end."""
    summary, said = run(
        image_overrides(
            folders[family], family, data, f"run_dir={tmp_path / 'run'}", "privacy.metrics=exact",
            "model.about.title=A tiny encoder", "model.about.licence=MIT", *more,
        )
    )  # fmt: skip
    assert summary["rounds"] == 2
    assert summary["privacy"]["private"]
    assert set(summary["test"]["sites"]) == {"a", "b"}
    assert ("enlarged" in said) == bool(warning)
    assert warning in said.replace("\n", " ")
    card = (tmp_path / "run" / "MODEL_CARD.md").read_text()
    assert "Licence of the base model: MIT" in card
    assert "A tiny encoder" in card
    assert (tmp_path / "run" / "adapter" / "head.safetensors").exists()
