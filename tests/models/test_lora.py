"""Adapters of every family, on all matrices that can have one, compute what PEFT computes with the files they make."""

import pytest
import torch

from seqtrain.models import from_pretrained
from seqtrain.models.lora import Adapter, add_adapters, chosen, merge_adapters, targets_of, write_adapter
from seqtrain.models.pretrained import family_of_config
from tests.models.family_cases import CASES, make, some_tokens

# Names that fit other matrices too; the rest by hand.
MARKS = (pytest.mark.full, pytest.mark.all)
IN_CI = ("granitemoehybrid",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS[name in IN_CI]) for name in CASES])
@torch.no_grad()
def test_peft_computes_the_same(tmp_path, name):
    from peft import PeftModel

    theirs = make(name)
    theirs.save_pretrained(tmp_path / "model")
    model = from_pretrained(tmp_path / "model")
    tokens = some_tokens(2, 40)
    before = model(tokens, all_logits=True)[0]
    family, config = family_of_config(model.origin.config)
    targets = chosen(targets_of(model, family, config), "all", name)
    add_adapters(model, targets, rank=3, alpha=6)
    torch.testing.assert_close(model(tokens, all_logits=True)[0], before)
    for module in model.modules():
        if isinstance(module, Adapter):
            module.lora_B.weight.normal_(std=0.1)
    expected = model(tokens, all_logits=True)[0]
    assert (expected - before).abs().max() > 1e-2
    (tmp_path / "adapter").mkdir()
    write_adapter(model, family, config, tmp_path / "adapter", base=str(tmp_path / "model"))
    adapted = PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert {key for key, _ in adapted.named_parameters() if "lora_A" in key} == {
        f"base_model.model.{key}.lora_A.default.weight" for key in targets
    }
    torch.testing.assert_close(adapted(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    merge_adapters(model)
    torch.testing.assert_close(model(tokens, all_logits=True)[0], expected, rtol=1e-5, atol=1e-5)
