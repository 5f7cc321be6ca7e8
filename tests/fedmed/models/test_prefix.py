"""The stored prefix changes nothing: difference 0.0, in outputs and in gradients."""

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from fedmed.errors import ModelError
from fedmed.models.prefix import capture, first_trainable_block, replayed, transformer_blocks

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

FAMILIES = {
    "bert": lambda: t.BertModel(t.BertConfig(vocab_size=50, **SIZES)),
    "roberta": lambda: t.RobertaModel(t.RobertaConfig(vocab_size=50, **SIZES)),
    "electra": lambda: t.ElectraModel(t.ElectraConfig(vocab_size=50, embedding_size=32, **SIZES)),
    "vit": lambda: t.ViTModel(t.ViTConfig(**SIZES, **IMAGE)),
    "dinov2": lambda: t.Dinov2Model(
        t.Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, **IMAGE)
    ),
    "modernbert": lambda: t.ModernBertModel(
        t.ModernBertConfig(
            vocab_size=50,
            pad_token_id=0,
            bos_token_id=1,
            cls_token_id=1,
            eos_token_id=2,
            sep_token_id=2,
            local_attention=4,
            global_attn_every_n_layers=3,
            **SIZES,
        )
    ),
    "registers": lambda: t.Dinov2WithRegistersModel(
        t.Dinov2WithRegistersConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, **IMAGE)
    ),
    "dinov3": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(num_register_tokens=2, **SIZES, **IMAGE)),
    "siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**SIZES, **IMAGE)),
    "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SIZES, **IMAGE)),
    "convnext": lambda: t.ConvNextModel(
        t.ConvNextConfig(hidden_sizes=[8, 16, 32], depths=[1, 2, 1], num_stages=3)
    ),
    "convnextv2": lambda: t.ConvNextV2Model(
        t.ConvNextV2Config(hidden_sizes=[8, 16, 32], depths=[1, 2, 1], num_stages=3)
    ),
    "deit": lambda: t.DeiTModel(t.DeiTConfig(**SIZES, **IMAGE)),
}


def build(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    encoder = FAMILIES[family]().eval()
    if hasattr(encoder.config, "vocab_size"):
        lengths = torch.tensor([3, 5, 7, 6, 4])
        mask = (torch.arange(7)[None] < lengths[:, None]).long()
        return encoder, {"input_ids": torch.randint(3, 50, (5, 7)), "attention_mask": mask}
    return encoder, {"pixel_values": torch.randn(5, 3, 16, 16)}


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_a_stored_state_is_exact(family: str, cut: int) -> None:
    encoder, inputs = build(family)
    with torch.no_grad():
        whole = encoder(**inputs).last_hidden_state
        state = capture(encoder, cut, inputs)
        if "pixel_values" in inputs:
            # Nothing but its shape is read.
            blank = {"pixel_values": torch.full_like(inputs["pixel_values"], torch.nan)}
        else:
            blank = inputs
        with replayed(encoder, cut, state):
            replay = encoder(**blank).last_hidden_state
        after = encoder(**inputs).last_hidden_state
    assert (replay - whole).abs().max() == 0.0
    assert (after - whole).abs().max() == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_suffix_are_the_same(family: str) -> None:
    encoder, inputs = build(family)
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    _, blocks = transformer_blocks(encoder)
    for parameter in blocks[2].parameters():
        parameter.requires_grad_(True)
    assert first_trainable_block(encoder) == 2
    trained = [p for p in encoder.parameters() if p.requires_grad]
    expected = torch.autograd.grad(encoder(**inputs).last_hidden_state.sum(), trained)
    with replayed(encoder, 2, capture(encoder, 2, inputs)):
        got = torch.autograd.grad(encoder(**inputs).last_hidden_state.sum(), trained)
    assert max((a - b).abs().max().item() for a, b in zip(expected, got, strict=True)) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_before_the_cut_is_not_computed(family: str) -> None:
    encoder, inputs = build(family)
    prefixes, blocks = transformer_blocks(encoder)
    assert len(blocks) == 4
    calls: list[str] = []
    for name, module in encoder.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, n=name: calls.append(n))
    with torch.no_grad():
        capture(encoder, 2, inputs)
        assert any(name.startswith(f"{prefixes[1]}.") for name in calls)
        # Nor what comes after it, where the state alone is wanted.
        assert not any(name.startswith(f"{prefixes[2]}.") for name in calls)
        state = capture(encoder, 3, inputs)
        calls.clear()
        with replayed(encoder, 3, state):
            encoder(**inputs)
    inside = [name for name in calls if name.startswith(tuple(f"{prefix}." for prefix in prefixes))]
    assert inside
    assert all(name.startswith(f"{prefixes[3]}.") for name in inside)
    if "pixel_values" in inputs:
        assert not any(name.startswith("embeddings") for name in calls)


def test_a_trainable_embedding_forbids_storing() -> None:
    encoder, _ = build("bert")
    encoder.requires_grad_(False)
    assert first_trainable_block(encoder) == 4
    encoder.get_input_embeddings().requires_grad_(True)
    assert first_trainable_block(encoder) is None


def test_an_error_inside_restores_the_blocks() -> None:
    encoder, inputs = build("bert")
    whole = encoder(**inputs).last_hidden_state
    with pytest.raises(KeyError), replayed(encoder, 2, capture(encoder, 2, inputs)):
        raise KeyError
    assert torch.equal(encoder(**inputs).last_hidden_state, whole)


def test_a_network_without_blocks_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="Linear: no list of transformer blocks"):
        transformer_blocks(nn.Linear(2, 2))
