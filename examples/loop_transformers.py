"""Growth in the Trainer of Hugging Face transformers: one callback. Text by characters, a small GPT-2.

python -m examples.loop_transformers
python -m examples.loop_transformers --checkpoint out/hf --stop-after 150
python -m examples.loop_transformers --resume out/hf

Shakespeare where $FXGROW_DATA is set, else Python's manual. Prints the held-out loss every 120 steps and the history of
the growths, three of 8 units in each MLP.

step 120: 2.7843 nats per character on held-out text
step 240: 2.4812 nats per character on held-out text
step 360: 2.4105 nats per character on held-out text
step 480: 2.3765 nats per character on held-out text

step  epoch       parameters       loss, eval      loss, train  predicted  gamma  seconds  added
────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
 120      0  14,016 → 15,056  2.8987 → 2.8749  2.9204 → 2.9242     0.0216   99.9     24.4  transformer.h.0.mlp.c_fc +8,
                                                                                           transformer.h.1.mlp.c_fc +8
 240      0  15,056 → 16,096  2.5961 → 2.5731  2.6379 → 2.6248     0.0267    191     21.4  transformer.h.0.mlp.c_fc +8,
                                                                                           transformer.h.1.mlp.c_fc +8
 360      0  16,096 → 17,136  2.5144 → 2.4979  2.5682 → 2.5558     0.0176   98.8     22.4  transformer.h.0.mlp.c_fc +8,
                                                                                           transformer.h.1.mlp.c_fc +8

3 growths, 0 declined, 68.2 s
"""

from __future__ import annotations

import tempfile
from pathlib import Path

# imported before the models of transformers: makes torchvision importable with a CPU build of torch
from fxgrow.integrations.transformers import GrowthCallback, resized

# isort: split
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

import fxgrow
from examples.data import text
from examples.options import options

STEPS, EVERY, SAMPLES, BATCH, CONTEXT, RATE = 480, 120, 512, 16, 32, 3e-3


class Lines(Dataset[dict[str, Tensor]]):
    """Pieces of `CONTEXT` characters."""

    def __init__(self, tokens: Tensor) -> None:
        self.pieces = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[at], "labels": self.pieces[at]}


class Stop(TrainerCallback):
    """Saves after so many steps and stops, without the evaluation at `max_steps`, which draws random numbers."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_save = control.should_training_stop = state.global_step == self.step


def run(checkpoint: Path | None = None, stop: int | None = None, resume: Path | None = None) -> nn.Module:
    """Trains for `STEPS` steps, or until `stop`; returns the model."""
    train, held, alphabet = text()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(alphabet), n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, n_inner=16,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    last = None if resume is None else get_last_checkpoint(str(resume))
    model = GPT2LMHeadModel(config)
    if last is not None:
        model = resized(model, last)
    # every growth adds eight units to the hidden layer of each MLP
    wider = {f"transformer.h.{i}.mlp.c_fc": 8 for i in range(config.n_layer)}
    growth = GrowthCallback(fxgrow.Every(steps=EVERY).until(growths=3), neurons=wider, samples=SAMPLES)
    with tempfile.TemporaryDirectory() as nowhere:
        args = TrainingArguments(
            output_dir=str(checkpoint or nowhere),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            eval_strategy="steps",
            eval_steps=EVERY,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        callbacks = [growth] if checkpoint is None else [growth, Stop(stop or STEPS)]
        trainer = Trainer(model, args, train_dataset=Lines(train), eval_dataset=Lines(held[:8192]), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=last)
    for entry in trainer.state.log_history:
        if "eval_loss" in entry:
            print(f"step {entry['step']}: {entry['eval_loss']:.4f} nats per character on held-out text")
    print(f"\n{growth.grower.history}")
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    run(*options("steps"))
