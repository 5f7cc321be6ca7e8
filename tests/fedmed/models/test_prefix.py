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


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_a_stored_state_is_exact(family: str, cut: int) -> None:
    encoder, inputs = build(family)
    with torch.no_grad():
        whole = encoder(**inputs).last_hidden_state
        state = capture(encoder, cut, inputs)
        with replayed(encoder, cut, state):
            replay = encoder(**inputs).last_hidden_state
        after = encoder(**inputs).last_hidden_state
    assert (replay - whole).abs().max() == 0.0
    assert (after - whole).abs().max() == 0.0


@pytest.mark.parametrize("family", ["bert", "vit"])
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


def test_the_blocks_before_the_cut_are_not_computed() -> None:
    encoder, inputs = build("bert")
    _, blocks = transformer_blocks(encoder)
    calls: list[int] = []
    for index, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, i=index: calls.append(i))
    with torch.no_grad():
        state = capture(encoder, 3, inputs)
        calls.clear()
        with replayed(encoder, 3, state):
            encoder(**inputs)
    assert calls == [3]


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
