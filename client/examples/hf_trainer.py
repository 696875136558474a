"""A Hugging Face ``Trainer`` with asynchronous Shampoo, on a small GPT-2 made from a config.

    pip install transformers accelerate
    python client/examples/hf_trainer.py
    python client/examples/hf_trainer.py --output out --steps 100
    python client/examples/hf_trainer.py --output out --steps 200 --resume     # from the Trainer's checkpoint
    python client/examples/hf_trainer.py --bf16
    torchrun --nproc-per-node 2 client/examples/hf_trainer.py
    python client/examples/hf_trainer.py --attach                              # inside of AdamW instead

The optimizer goes to the Trainer with a scheduler. Checkpoints are the Trainer's own; the metrics stand in
its logs beside the loss.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

from preconditioner_client import Shampoo, StalenessConfig, attach
from preconditioner_client.adapters import hf_callback, metrics_source, report_first

CONTEXT = 32

# So small a model is done before a service has started, so here versions are adopted on a schedule, which
# waits for them, and the run is reproducible. In real training leave `staleness` out: no step waits then.
STALENESS = StalenessConfig(adoption="scheduled", refresh_every=5, delay=5)


class SourceText(Dataset[dict[str, torch.Tensor]]):
    """The bytes of a module of the standard library, in pieces."""

    def __init__(self) -> None:
        text = Path(argparse.__file__).read_bytes()
        pieces = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.pieces = pieces[: len(pieces) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def small_gpt2() -> GPT2LMHeadModel:
    """A GPT-2 for bytes, with new weights."""
    config = GPT2Config(
        vocab_size=256, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last loss and how many versions were adopted."""
    parser = argparse.ArgumentParser(description="asynchronous Shampoo in a Hugging Face Trainer")
    parser.add_argument("--service", default="embedded", help="embedded, or host:port of a running one")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", help="folder of the checkpoints; default a temporary one")
    parser.add_argument("--save-steps", type=int, help="steps between checkpoints; default only the last")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --output")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--attach", action="store_true", help="precondition inside of AdamW")
    parser.add_argument("--report-to", default="none", help="a reporter of transformers, as in tensorboard")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = small_gpt2()
    optimizer: torch.optim.Optimizer
    if args.attach:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        attach(optimizer, model, staleness=STALENESS, service=args.service)
    else:
        optimizer = Shampoo(
            model.named_parameters(), lr=3e-3, weight_decay=0.01, staleness=STALENESS, service=args.service
        )
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=10, num_training_steps=args.steps)

    with tempfile.TemporaryDirectory() as temporary:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=args.output or temporary,
                max_steps=args.steps,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                max_grad_norm=1.0,
                use_cpu=not torch.cuda.is_available(),
                bf16=args.bf16,
                logging_steps=10,
                save_steps=args.save_steps or args.steps,
                report_to=args.report_to,
                disable_tqdm=True,
            ),
            train_dataset=SourceText(),
            optimizers=(optimizer, scheduler),
        )
        # callbacks=[hf_callback()] would do for the log history; this way the reporters see the metrics too.
        # With several processes the callback also completes the checkpoints, which the first one writes.
        report_first(trainer, hf_callback())
        result = trainer.train(resume_from_checkpoint=args.resume or None)
    metrics = metrics_source(trainer.optimizer).metrics()
    return {
        "loss": result.training_loss,
        "step": metrics["step"],
        "versions_adopted": metrics["versions_adopted"],
    }


if __name__ == "__main__":
    print(json.dumps(main()))
