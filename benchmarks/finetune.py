"""Training in OneFlow and in PyTorch, each as a plain loop and as featcache, in one run.

    python benchmarks/finetune.py CIFAR10.zip [--torch-python .venv-torch/bin/python]
                                  [--size 64] [--steps 8] [--rounds 3] [--json FILE]

CIFAR10.zip holds train/ and test/ with class folders. In turn, each in a process of its own,
with batches of 64 and the same images in the same order and flip views:

- the tutorial's loop as written: flowvision's ResNet-18 in OneFlow, DataLoader, PIL, SGD;
- `featcache.finetune` with OneFlow;
- the same loop in PyTorch, channels last;
- `featcache.finetune` with PyTorch;

training everything ("full"), or with everything up to layer3 frozen ("layer4 + head"); and the
latter with featcache from a cache of layer3 (`extract --cut layer3`), whose making is not counted.

--torch-python is an interpreter with PyTorch, where this one has OneFlow; without it PyTorch is
imported here if it can be. At 64 px this takes about 6 minutes on two cores; for 224 px use
--size 224 --steps 3. `--only PyTorch` leaves out the others, `--precision bf16` is for these, and
`--device cuda` uses a GPU.

Prints images per second of the median step, as the median of the rounds with the least and the
greatest; how many times the tutorial's each is, and how many times the plain PyTorch loop's, as the
median of the rounds' ratios; and how far the losses of the steps lie apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from extract import processor, spread

WEIGHTS = "tinyimagenet32"
BATCH = 64
# name, function, engine, everything up to layer3 frozen
CONTENDERS = tuple(
    (f"{name}, {what}", function, engine, frozen)
    for what, frozen in (("full", False), ("layer4 + head", True))
    for name, function, engine in (
        ("tutorial, OneFlow", "tutorial", "oneflow"),
        ("featcache, OneFlow", "uncached", "oneflow"),
        ("plain loop, PyTorch", "plain_torch", "torch"),
        ("featcache, PyTorch", "uncached", "torch"),
        *(
            ("featcache from a cache, OneFlow", "cached", "oneflow"),
            ("featcache from a cache, PyTorch", "cached", "torch"),
        )
        * frozen,
    )
)


def part(zip_path: str, n_images: int):
    """Return a data set of so many training images, and as few test images as there can be."""
    from featcache import load_dataset
    from featcache.datasets.dataset import Dataset
    from featcache.sampling import stratified_rows

    data = load_dataset(zip_path)
    train = data.train.take(stratified_rows(data.train.labels, n_images, 0, "train"))
    test = data.test.take(stratified_rows(data.test.labels, 20, 0, "test"))
    return Dataset(data.name, train, test, "a part")


def tutorial(zip_path: str, size: int, n_steps: int, frozen: bool, trainer: dict) -> dict:
    """Train as the tutorial does, on the images and flips that featcache draws with seed 0."""
    from featcache.frameworks import import_oneflow

    flow = import_oneflow()
    import flowvision
    from flowvision import transforms
    from PIL.Image import Transpose

    from featcache import load_weights
    from featcache.sampling import epoch_plan, initial_head

    data = part(zip_path, n_steps * BATCH).train
    rows, views = epoch_plan(len(data), 4, 0, 0)
    transform = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    class Images(flow.utils.data.Dataset):
        def __len__(self):
            return len(data)

        def __getitem__(self, index):
            image = data.images[int(rows[index])]
            if views[index] & 1:
                image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
            if views[index] & 2:
                image = image.transpose(Transpose.FLIP_TOP_BOTTOM)
            return transform(image), int(data.labels[rows[index]])

    model = flowvision.models.resnet18(num_classes=len(data.class_names))
    state = {k: v for k, v in load_weights(WEIGHTS).state.items() if not k.startswith("fc.")}
    weight, bias = initial_head(len(data.class_names), 512, 0)
    model.load_state_dict({**state, "fc.weight": weight, "fc.bias": bias})
    batches = flow.utils.data.DataLoader(Images(), batch_size=BATCH, num_workers=0)
    return loop(flow, model, batches, frozen, nullcontext())


def plain_torch(zip_path: str, size: int, n_steps: int, frozen: bool, trainer: dict) -> dict:
    """Train with the same loop in PyTorch, channels last."""
    import numpy as np
    import torch
    from PIL.Image import Resampling, Transpose

    from featcache import load_weights
    from featcache.backbones.architectures import get_backbone
    from featcache.backbones.torch_engine import build_backbone
    from featcache.sampling import epoch_plan, initial_head

    data = part(zip_path, n_steps * BATCH).train
    rows, views = epoch_plan(len(data), 4, 0, 0)
    device = "cpu" if trainer["device"] == "auto" else trainer["device"]
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(data)

        def __getitem__(self, index):
            image = data.images[int(rows[index])]
            if views[index] & 1:
                image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
            if views[index] & 2:
                image = image.transpose(Transpose.FLIP_TOP_BOTTOM)
            pixels = np.array(image.resize((size, size), Resampling.BILINEAR))
            x = (torch.from_numpy(pixels) / 255 - mean) / std
            return x.permute(2, 0, 1), int(data.labels[rows[index]])

    model = build_backbone(get_backbone("resnet18"))
    model.fc = torch.nn.Linear(512, len(data.class_names))
    state = {k: v for k, v in load_weights(WEIGHTS).state.items() if not k.startswith("fc.")}
    weight, bias = initial_head(len(data.class_names), 512, 0)
    state |= {"fc.weight": weight, "fc.bias": bias}
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    model.to(device, memory_format=torch.channels_last)
    batches = (
        (x.to(device, memory_format=torch.channels_last), y.to(device))
        for x, y in torch.utils.data.DataLoader(Images(), batch_size=BATCH, num_workers=0)
    )
    context = nullcontext()
    if trainer["precision"] == "bf16":
        context = torch.autocast(device, torch.bfloat16)
    return loop(torch, model, batches, frozen, context)


def loop(flow, model, batches, frozen: bool, context) -> dict:
    """Train for an epoch, as the tutorial writes it, in either framework."""
    model.train()
    trained = list(model.parameters())
    if frozen:
        trained = [*model.layer4.parameters(), *model.fc.parameters()]
        for parameter in model.parameters():
            parameter.requires_grad = False
        for parameter in trained:
            parameter.requires_grad = True
        for module in (model.bn1, model.layer1, model.layer2, model.layer3):
            module.eval()
    optimizer = flow.optim.SGD(trained, lr=1e-3, momentum=0.9, weight_decay=5e-4)
    criterion = flow.nn.CrossEntropyLoss()
    losses, seconds = [], []
    start = time.perf_counter()
    for images, labels in batches:
        with context:
            loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        trained[0].detach().cpu().numpy()  # the step is over when its update is
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return {"losses": losses, "seconds": seconds}


def uncached(zip_path: str, size: int, n_steps: int, frozen: bool, trainer: dict) -> dict:
    data = part(zip_path, n_steps * BATCH)
    return _finetune(data, n_steps, weights=WEIGHTS, size=size, **_until(frozen), **trainer)


def cached(zip_path: str, size: int, n_steps: int, frozen: bool, trainer: dict) -> dict:
    import featcache

    data = part(zip_path, n_steps * BATCH)
    with tempfile.TemporaryDirectory() as folder:
        options = {"cut": "layer3", "views": "flips", "output": folder, "reuse": False}
        made = featcache.extract(data, weights=WEIGHTS, size=size, **options)
        trained = _finetune(None, n_steps, cache=made.cache, **_until(frozen), **trainer)
    return {**trained, "extract_s": made.wall_s, "extracted_by": made.engine}


def _until(frozen: bool) -> dict:
    return {"freeze_until": "layer3"} if frozen else {}


def _finetune(data, n_steps: int, **options) -> dict:
    """Run one epoch of `featcache.finetune`; read its steps from the log."""
    import featcache

    with tempfile.TemporaryDirectory() as folder:
        result = featcache.finetune(data, "full", epochs=1, runs=folder, **options)
        log = (result.run / "metrics.jsonl").read_text(encoding="utf-8")
    steps = [line for line in map(json.loads, log.splitlines()) if "loss" in line]
    assert len(steps) == n_steps
    clock = [0.0, *(line["wall_s"] for line in steps)]
    seconds = [after - before for before, after in itertools.pairwise(clock)]
    return {"losses": [line["loss"] for line in steps], "seconds": seconds}


def in_child(python: str, *arguments: object) -> dict:
    """Run one of the functions above in a process of its own."""
    command = [python, __file__, "--child", json.dumps(arguments)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


def show(rows: list[dict], size: int, n_steps: int, precision: str) -> None:
    rates: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    for row in rows:
        rates.setdefault(row["what"], []).append(BATCH / statistics.median(row["seconds"]))
        losses[row["what"]] = row["losses"]
    print(f"ResNet-18 at {size} px, {n_steps} steps of {BATCH}, {precision}, {processor()}")
    print(f"{'':46} {'img/s':>22} {'x tutorial':>11} {'x PyTorch':>10} {'loss apart':>11}")
    for what, of_rounds in rates.items():
        trained = what.rpartition(", ")[2]
        bases = f"tutorial, OneFlow, {trained}", f"plain loop, PyTorch, {trained}"
        cells = []
        for base in bases:  # round by round: the speed of a machine drifts
            ratios = [a / b for a, b in zip(of_rounds, rates.get(base, []), strict=False)]
            cells.append(f"{statistics.median(ratios):10.2f}" if ratios else " " * 10)
        base = next((losses[one] for one in bases if one in losses), losses[what])
        apart = max(abs(a - b) for a, b in zip(losses[what], base, strict=True))
        print(f"{what:46} {spread(sorted(of_rounds)):>22}  {cells[0]} {cells[1]} {apart:11.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="a zip of train/ and test/ with class folders")
    parser.add_argument("--torch-python", default=sys.executable, help="one that has PyTorch")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--only", default="", help="contenders whose name holds this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *arguments = json.loads(options.child)
        print(json.dumps(globals()[name](*arguments)))
        return
    rows = []
    for _ in range(options.rounds):
        for what, function, engine, frozen in CONTENDERS:
            if options.only not in what:
                continue
            python = options.torch_python if engine == "torch" else sys.executable
            trainer = {"engine": engine, "device": options.device, "precision": options.precision}
            measured = in_child(
                python, function, options.data, options.size, options.steps, frozen, trainer
            )
            rows.append({"what": what, "size": options.size, **trainer, **measured})
            rate = BATCH / statistics.median(measured["seconds"])
            print(f"{what}: {rate:.1f} img/s", file=sys.stderr, flush=True)
    show(rows, options.size, options.steps, options.precision)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
