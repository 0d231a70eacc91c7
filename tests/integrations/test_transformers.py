"""Growth by a callback of the Trainer of transformers."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from torch.utils.data import Dataset

import fxgrow

growing = pytest.importorskip("fxgrow.integrations.transformers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH = "transformer.h.0.mlp.c_fc"


class Rows(Dataset):
    def __init__(self) -> None:
        self.rows = torch.randint(0, 7, (48, 6), generator=torch.Generator().manual_seed(0)).cumsum(1) % 7

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at):
        return {"input_ids": self.rows[at], "labels": self.rows[at]}


def build(seed: int = 0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=7, n_positions=6, n_embd=8, n_layer=1, n_head=2, n_inner=4, bos_token_id=None, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config)


def trainer_of(model, growth, folder, steps: int, **options):
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2,
        lr_scheduler_type="constant", report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        **{"save_strategy": "no", "logging_strategy": "no", **options},
    )  # fmt: skip
    return transformers.Trainer(model, args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[growth])


def callback(every: int = 3, growths: int = 3, **options):
    schedule = options.pop("schedule", fxgrow.Every(steps=every).until(growths=growths))
    return growing.GrowthCallback(schedule, neurons={WIDTH: 2}, **options)


def test_grows_saves_and_resumes_bit_for_bit(tmp_path) -> None:
    whole, growth = build(), callback()
    trainer = trainer_of(whole, growth, tmp_path, 8, save_strategy="steps", save_steps=4)
    trainer.train()
    assert trainer.model is whole and type(whole) is transformers.GPT2LMHeadModel
    assert whole.get_submodule(WIDTH).nf == 8 and [e.step for e in growth.grower.history] == [3, 6]

    trainer.save_model(str(tmp_path / "final"))
    final = growing.resized(build(seed=1), tmp_path / "final")
    safetensors.torch.load_model(final, tmp_path / "final" / "model.safetensors")
    assert all(torch.equal(value, final.state_dict()[name]) for name, value in whole.state_dict().items())

    # the checkpoint lies between two growths, within the second epoch of none: 6 steps are one
    model = growing.resized(build(seed=1), tmp_path / "checkpoint-4")
    assert model.get_submodule(WIDTH).nf == 6
    again = callback()
    trainer_of(model, again, tmp_path, 8).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [e.units for e in again.grower.history] == [{WIDTH: 2}] * 2
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, pad_token_id=0).shape == (1, 4)


def test_mixed_precision_epochs_and_a_metric(tmp_path) -> None:
    schedule = fxgrow.Every(epochs=1) | fxgrow.OnPlateau(patience=1, min_delta=1e9)
    growth = callback(schedule=schedule.until(growths=2), monitor="eval_loss")
    model = build()
    trainer_of(model, growth, tmp_path, 14, bf16=True, eval_strategy="epoch").train()
    # after the first epoch; the second evaluation is no better, after step 12, whose epoch end has grown already
    assert [e.step for e in growth.grower.history] == [6, 12]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_best_model_at_the_end_is_refused(tmp_path) -> None:
    options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    trainer = trainer_of(build(), callback(), tmp_path, 4, load_best_model_at_end=True, **options)
    with pytest.raises(fxgrow.FxgrowError, match="load_best_model_at_end"):
        trainer.train()


def test_a_metric_that_is_not_there(tmp_path) -> None:
    trainer = trainer_of(build(), callback(monitor="accuracy"), tmp_path, 1, eval_strategy="steps", eval_steps=1)
    with pytest.raises(fxgrow.FxgrowError, match="'accuracy' is no metric of this evaluation; those are: eval_loss"):
        trainer.train()


def test_folders_without_growth(tmp_path) -> None:
    build().save_pretrained(tmp_path / "plain")
    with pytest.raises(fxgrow.FileError, match="config.json contains no growth"):
        growing.resized(build(), tmp_path / "plain")
    with pytest.raises(fxgrow.FileError, match="cannot be read"):
        growing.resized(build(), tmp_path)
    (tmp_path / growing.STATE).write_text(json.dumps({"stateful_callbacks": {"TrainerControl": {}}}))
    with pytest.raises(fxgrow.FileError, match="without a GrowthCallback"):
        growing.resized(build(), tmp_path)
    for path in (None, 3, "a\0b"):
        with pytest.raises(fxgrow.FileError, match="checkpoint="):
            growing.resized(build(), path)
