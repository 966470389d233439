"""Trains with TRL's SFTTrainer; run by ``benchmarks.training`` in TRL's own environment.

    python _sft_with_trl.py SETTINGS.json

SETTINGS names ``base``, ``rows``, ``out`` and the recipe. Rank 0 writes ``out``/result.json:
the seconds of the training loop, without what comes before and after it.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    trainer = SFTTrainer(
        model=settings["base"],
        args=SFTConfig(
            output_dir=settings["out"],
            num_train_epochs=settings["epochs"],
            per_device_train_batch_size=settings["batch_size"],
            learning_rate=settings["learning_rate"],
            weight_decay=settings["weight_decay"],
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            # Its default cuts rows of 1,880 tokens.
            max_length=None,
            # What follows makes it faster here than its defaults do.
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            train_sampling_strategy="group_by_length",
            dataloader_pin_memory=False,
            optim="adamw_torch_fused",
            model_init_kwargs={"dtype": "float32"},
            ddp_backend="gloo" if settings["workers"] > 1 else None,
            ddp_find_unused_parameters=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=50,
            seed=0,
        ),
        train_dataset=_dataset(Path(settings["rows"])),
    )
    result = trainer.train()
    trainer.save_model(settings["out"])
    if trainer.is_world_process_zero():
        figures = {"seconds": result.metrics["train_runtime"], "loss": result.training_loss}
        (Path(settings["out"]) / "result.json").write_text(json.dumps(figures))
    if torch.distributed.is_initialized():
        # A rank that leaves while another still talks to it would abort.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _dataset(rows: Path) -> Dataset:
    conversations = [json.loads(line)["messages"] for line in rows.read_text("utf-8").splitlines()]
    return Dataset.from_list(
        [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in conversations]
    )


if __name__ == "__main__":
    main()
