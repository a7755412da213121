"""Evidence belongs to one target and one set of records; of anything else it is refused."""

import json
import shutil

import pytest
import safetensors.torch

from lightleak.audits.measure import claim
from lightleak.audits.models import Model, describe, release
from lightleak.audits.passes import Pass
from lightleak.audits.settings import AuditSettings
from lightleak.audits.sides import read_sides
from lightleak.errors import UserError
from lightleak.runs import Silent


@pytest.fixture
def parts(lab_lora, tmp_path):
    """A model, its adapter and records, in folders that may be changed."""
    shutil.copytree(lab_lora.target, tmp_path / "base")
    shutil.copytree(lab_lora.adapter, tmp_path / "adapter")
    source = lab_lora.members.parent
    shutil.copytree(source / "img", tmp_path / "img")
    for side in ("members", "nonmembers"):
        shutil.copy(source / f"{side}.jsonl", tmp_path)
    (tmp_path / "evidence").mkdir()
    yield tmp_path
    release()


def claimed(parts):
    release()
    settings = AuditSettings.read(
        target=parts / "base",
        adapter=parts / "adapter",
        suspect=parts / "members.jsonl",
        control=parts / "nonmembers.jsonl",
    )
    model = Model(settings)
    description = describe(model, lambda _: None)
    settings = settings.of_kind(description.kind)
    claim(Pass(parts / "evidence", settings, model, description), read_sides(settings, Silent()))


def change_tensor(file):
    tensors = safetensors.torch.load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


def change_template(base):
    file = base / "chat_template.jinja"
    file.write_text(file.read_text() + "{# #}")


def change_record(file):
    first, *others = file.read_text().splitlines()
    record = json.loads(first)
    record["text"] += " indeed"
    file.write_text("\n".join([json.dumps(record), *others]) + "\n")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda p: change_tensor(p / "base" / "model.safetensors"), "target weights"),
        (lambda p: change_tensor(p / "adapter" / "adapter_model.safetensors"), "target adapter"),
        (lambda p: change_template(p / "base"), "target processor"),
        (lambda p: change_record(p / "members.jsonl"), "suspect records"),
    ],
    ids=["weights", "adapter", "template", "record"],
)
def test_what_changed_is_named_and_the_old_evidence_refused(parts, change, name):
    claimed(parts)
    claimed(parts)
    change(parts)
    with pytest.raises(UserError, match=f"its evidence was made with another {name}"):
        claimed(parts)


def test_evidence_of_another_version_is_refused(parts):
    claimed(parts)
    file = parts / "evidence" / "fingerprint.json"
    file.write_text(file.read_text().replace('"version of torch": "', '"version of torch": "0.'))
    with pytest.raises(UserError, match="another version of torch"):
        claimed(parts)
