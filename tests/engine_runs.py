"""Many small trainings on one group of Ray Train workers, and the same ones in plain PyTorch.

Starting workers takes longer than training a tiny model. Each case is the whole training
loop; only where its checkpoints go is not Ray Train's.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import deepspeed
import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config import LoraConfig, ScratchConfig, TrainConfig
from distill.training.base_model import make_scratch
from distill.training.batches import EncodedRows, plan_epoch
from distill.training.encoding import encode
from distill.training.engine import parameter_groups
from distill.training.loop import Training
from distill.training.lora import add_adapters, plain_model
from distill.training.schedule import learning_rate_factor
from tests.training_runs import SIZES, row

PROMPT_WEIGHT = 0.3
NO_ROWS = EncodedRows(
    input_ids=np.zeros(0, np.int32),
    completion=np.zeros(0, np.bool_),
    offsets=np.zeros(1, np.int64),
)
# With a large epsilon, Adam's steps are as long as the gradient, so that a wrong scale of the
# gradient shows as well as a wrong direction.
OPTIMIZER = {"optimizer": {"params": {"eps": 1.0}}}
SETTINGS = {
    "num_train_epochs": 2,
    "bf16": False,
    "learning_rate": 0.5,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
}


def make_base(folder):
    """A tiny base model, and 13 rows for it: no number of ranks or batches divides them."""
    conversations = [row(number)["messages"] for number in range(13)]
    make_scratch(folder, conversations, ScratchConfig(**SIZES), max_length=512, seed=0)
    rows, _ = encode(conversations, AutoTokenizer.from_pretrained(folder), 512)
    return rows


def train_cases(folder, base, rows, cases, num_workers):
    """Train each case; its student is ``folder/<case>/model``, its metrics ``metrics.json``."""
    config = {"folder": str(folder), "base": str(base), "rows": ray.put(rows), "cases": cases}
    trainer = ray.train.torch.TorchTrainer(
        _train_each,
        train_loop_config={**config, "none": ray.put(NO_ROWS)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers, resources_per_worker={"CPU": 1}
        ),
        torch_config=ray.train.torch.TorchConfig(backend="gloo"),
        run_config=ray.train.RunConfig(
            storage_path=str(folder),
            name="ray",
            worker_runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu"}},
        ),
    )
    trainer.fit()


def settings_of(case):
    given = {key: value for key, value in case.items() if key in TrainConfig.model_fields}
    # Few steps, of which none is to be lost to finding a scale.
    fp16 = {"fp16": {"initial_scale_power": 8}} if case.get("fp16") else {}
    return {**SETTINGS, "deepspeed": OPTIMIZER | fp16, **given}


def _train_each(config):
    torch.set_num_threads(1)
    for name, case in config["cases"].items():
        folder = Path(config["folder"]) / name
        _train_case(config, case, folder)
        if case.get("resumed"):
            first = min(folder.glob("checkpoint_*"))
            _train_case(config, case, folder / "resumed", first)


def _train_case(config, case, folder, checkpoint=None):
    if case.get("fp16"):
        # Slow, but exact: what DeepSpeed asks for is fast float16.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    reported = []

    def report(metrics, checkpoint):
        reported.append(metrics)
        target = folder / f"checkpoint_{len(reported)}"
        shutil.copytree(checkpoint.path, target, dirs_exist_ok=True)
        if (target / "model").is_dir():
            shutil.copytree(target / "model", folder / "model", dirs_exist_ok=True)
        dist.barrier()

    ray.train.report = report
    ray.train.get_checkpoint = lambda: (
        checkpoint and ray.train.Checkpoint.from_directory(str(checkpoint))
    )
    training = Training(
        {
            "train": settings_of(case),
            "base": config["base"],
            "prompt_weight": PROMPT_WEIGHT,
            "dropout": case.get("dropout", 0.0),
            "lora": case.get("lora"),
            "use_gpu": False,
            "num_threads": 1,
            "rows": config["rows"],
            "val_rows": config["none"],
            "mailbox": None,
        }
    )
    training.run()
    module = plain_model(training.engine.module)
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    training.engine.eval()
    with torch.no_grad():
        logits = training.engine(input_ids=torch.arange(20)[None]).logits
    if dist.get_rank() == 0:
        torch.save(logits, folder / "logits.pt")
        save_file(weights, folder / "engine.safetensors")
        (folder / "metrics.json").write_text(json.dumps(reported[-1]))
    dist.barrier()


def train_plainly(base, rows, case, num_workers):
    """The same steps, each as one batch, without DeepSpeed, ranks or micro batches.

    Returns:
        The model, and the mean of each epoch's losses.
    """
    train = TrainConfig(**settings_of(case))
    torch.manual_seed(train.seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if case.get("lora"):
        model = add_adapters(model, LoraConfig(**case["lora"]))
    plans = [
        plan_epoch(
            rows.lengths,
            rows.loss_weights(PROMPT_WEIGHT),
            world_size=num_workers,
            micro_batch_size=train.per_device_train_batch_size,
            accumulation=train.gradient_accumulation_steps,
            epoch=epoch,
        )
        for epoch in range(1, train.num_train_epochs + 1)
    ]
    optimizer = torch.optim.AdamW(
        parameter_groups(model, train.weight_decay),
        lr=train.learning_rate,
        betas=(0.9, 0.999),
        eps=1.0,
    )
    factor = partial(
        learning_rate_factor,
        num_steps=sum(map(len, plans)),
        warmup_ratio=train.warmup_ratio,
        kind=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    means = []
    for plan in plans:
        losses = []
        for step in plan:
            losses.append(_plain_step(model, rows, step, optimizer, train.max_grad_norm))
            scheduler.step()
        means.append(sum(losses) / len(losses))
    return model, means


def _plain_step(model, rows, step, optimizer, max_grad_norm):
    total, weight = torch.zeros(()), 0.0
    for number in [i for rank in step.micro_batches for micro in rank for i in micro]:
        start, stop = rows.offsets[number : number + 2]
        ids = torch.from_numpy(rows.input_ids[start:stop]).long()
        weights = torch.from_numpy(rows.token_weights(number, PROMPT_WEIGHT))
        losses = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total = total + (losses * weights[1:]).sum()
        weight += float(weights.sum())
    optimizer.zero_grad()
    (total / weight).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return total.item() / weight
