"""A process holds one model; an adapter's base is what is left when the adapter is taken off."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lightleak import records, targets
from lightleak.audits.models import Model, release
from lightleak.audits.settings import TargetSettings
from lightleak.records import open_rgb


@pytest.fixture(autouse=True)
def _released():
    release()
    yield
    release()


def said(target, record):
    with torch.no_grad():
        batch = target.collate([target.encode(record, open_rgb(record.image))])
        return target.outputs(batch).log_probabilities[0]


def test_the_base_of_an_adapter_is_not_read_a_second_time(lab_lora):
    settings = TargetSettings(target=str(lab_lora.target), adapter=str(lab_lora.adapter))
    record = records.load(lab_lora.members).records[0]
    adapted = Model(settings).load()
    under = adapted.model.get_base_model()
    with_adapter = said(adapted, record)
    base = Model(settings, str(lab_lora.target)).load()
    fresh = targets.load(lab_lora.target)
    assert base.model is under
    assert torch.equal(said(base, record), said(fresh, record))
    assert not torch.equal(said(base, record), with_adapter)
    assert base.hashes == fresh.hashes
    assert list(dict(base.model.named_parameters())) == list(dict(fresh.model.named_parameters()))


def test_a_base_whose_biases_the_adapter_changed_is_read_anew(lab_lora, tmp_path):
    model = targets.load(lab_lora.target).model
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], bias="all"))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3 if "bias" in name else 0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    settings = TargetSettings(target=str(lab_lora.target), adapter=str(tmp_path / "adapter"))
    Model(settings).load()
    base = Model(settings, str(lab_lora.target)).load()
    record = records.load(lab_lora.members).records[0]
    assert torch.equal(said(base, record), said(targets.load(lab_lora.target), record))


def test_the_same_model_is_kept_and_another_takes_its_place(lab_lora, lab_tiny):
    settings = TargetSettings(target=str(lab_lora.target))
    one = Model(settings).load()
    assert Model(settings).load() is one
    other = Model(settings, str(lab_tiny.target)).load()
    assert other.hashes == targets.load(lab_tiny.target).hashes
    assert Model(settings).load() is not one
