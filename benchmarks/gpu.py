"""Speed on a GPU: the bare forward pass, featcache's extraction and training, plain PyTorch.

    python benchmarks/gpu.py CIFAR10.zip [--json FILE] [--minutes 7.5]

Needs torch and featcache's dependencies, but not an installed featcache; takes under 8 minutes.
ResNet-18, in turn, each in a process of its own:

- bare: the folded network on normalised pixels on the GPU, in bf16, channels last, at the best of
  several batch sizes; eager, then compiled (the compile time is printed, but not included);
- `featcache.extract` from the zip to a verified cache, in bf16: with decoding, with images decoded
  into RAM beforehand, and with FEATCACHE_COMPILE=1. Two rates each: of the pipeline alone, and of
  everything, including loading, compiling and packing;
- the tutorial: a DataLoader with 4 and 16 workers that opens, resizes and normalises with PIL, and
  the network in float32;
- `featcache.finetune`, all layers, in bf16, batches of 64 and 256; and a plain PyTorch loop on the
  same DataLoader, float32, batches of 64.

At 224 and at 64 pixels. A skipped row states the reason. Without a GPU, a small form runs on the
CPU; it only shows that the benchmark works.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WEIGHTS = "tinyimagenet32"
BATCH = 64
# What is measured: sides, images to extract and to train on, seconds per rate, batches, workers.
FORMS = {
    "whole": {
        "sizes": (224, 64),
        "extract": 60_000,
        "train": 20_000,
        "seconds": 10.0,
        "batches": (128, 256, 512, 1024),
        "workers": (4, 16),
        "warm_up": 4,
    },
    "small": {
        "sizes": (64,),
        "extract": 600,
        "train": 128,
        "seconds": 2.0,
        "batches": (8, 32),
        "workers": (1, 2),
        "warm_up": 1,
    },
}
CHILD_S = 100


def machine() -> dict:
    """Return what the figures depend on."""
    import torch

    import featcache
    from featcache.cores import usable_cores
    from featcache.frameworks import torch_gpu_status, torch_precisions

    device, gpu = torch_gpu_status()
    facts = {
        "device": device or "cpu",
        "precision": "bf16" if "bf16" in torch_precisions(device or "cpu") else "f32",
        "card": gpu if device else f"none ({gpu})",
        "cores": usable_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "featcache": featcache.__version__,
    }
    if device == "cuda" and torch.version.cuda:
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return facts


def data_of(zip_path: str, n_images: int):
    """Return the data set, or so many of its images: five training for each test image."""
    from featcache import load_dataset
    from featcache.datasets.dataset import Dataset
    from featcache.sampling import stratified_rows

    data = load_dataset(zip_path)
    if n_images >= len(data.train) + len(data.test):
        return data
    parts = {"train": n_images * 5 // 6, "test": n_images - n_images * 5 // 6}
    splits = {
        role: split.take(stratified_rows(split.labels, parts[role], 0, role))
        for role, split in data.splits()
    }
    return Dataset(data.name, splits["train"], splits["test"], "a part")


def bare(zip_path: str, size: int, device: str, precision: str, form: dict) -> dict:
    import torch

    from featcache import load_weights
    from featcache.backbones.architectures import get_backbone
    from featcache.backbones.torch_engine import Folded, build_backbone, dtype_of, load_backbone

    plain = build_backbone(get_backbone("resnet18"))
    load_backbone(plain, load_weights(WEIGHTS).state)
    where = {"device": device, "dtype": dtype_of(precision), "memory_format": torch.channels_last}
    network = Folded(plain.eval(), ("avgpool",), joined=False).requires_grad_(False).to(**where)

    def finish() -> None:
        if device != "cpu":
            getattr(torch, device).synchronize()

    def rate(network, batch: int) -> float:
        x = torch.randn(batch, 3, size, size).to(**where)
        with torch.inference_mode():
            network(x)
            finish()
            started, done = time.perf_counter(), 0
            while time.perf_counter() - started < form["seconds"] / 5:
                for _ in range(4):
                    network(x)
                finish()
                done += 4 * batch
            return done / (time.perf_counter() - started)

    rates = {batch: rate(network, batch) for batch in form["batches"]}
    best = max(rates, key=lambda batch: rates[batch])
    compiled = torch.compile(network, dynamic=False)
    started = time.perf_counter()
    with torch.inference_mode():
        compiled(torch.randn(best, 3, size, size).to(**where))
    finish()
    compile_s = time.perf_counter() - started
    return {
        "images_per_s": rate(compiled, best),
        "layer_by_layer": rates,
        "batch": best,
        "compile_s": compile_s,
    }


def extraction(
    zip_path: str, size: int, device: str, precision: str, form: dict, source: str
) -> dict:
    import numpy as np

    import featcache
    from featcache.datasets.dataset import Dataset, Split
    from featcache.datasets.images import ArrayImages

    data, decode_s = data_of(zip_path, form["extract"]), 0.0
    if source == "compiled":
        os.environ["FEATCACHE_COMPILE"] = "1"
    if source == "RAM":
        started = time.perf_counter()
        splits = []
        for _, split in data.splits():
            array = np.stack([np.asarray(split.images[row]) for row in range(len(split))])
            splits.append(Split(ArrayImages(array), split.labels, split.class_names, split.ids))
        data = Dataset(data.name, *splits, "in memory")
        decode_s = time.perf_counter() - started
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        made = featcache.extract(
            data,
            weights=WEIGHTS,
            size=size,
            engine="torch",
            device=device,
            precision=precision,
            output=folder,
            on_note=notes.append,
        )
        featcache.verify(made.cache)
        wall_s = time.perf_counter() - started
        meta = made.load().meta
    return {
        "images_per_s": meta["images_per_s"],
        "whole_images_per_s": made.n_rows / wall_s,
        "n": made.n_rows,
        "bottleneck": meta["bottleneck"],
        "stages_s": meta["stages_s"],
        "decoded_before_s": decode_s,
        "notes": notes,
    }


def loader(zip_path: str, size: int, workers: int, labels: bool = False):
    """Return a DataLoader as the tutorials write it, PIL and all."""
    import zipfile

    import numpy as np
    import torch
    from PIL import Image

    from featcache import load_dataset
    from featcache.preprocess import IMAGENET_MEAN, IMAGENET_STD

    split = load_dataset(zip_path).train
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    class Images(torch.utils.data.Dataset):
        archive = None

        def __len__(self):
            return len(split)

        def __getitem__(self, index):
            if self.archive is None:  # each worker its own
                self.archive = zipfile.ZipFile(zip_path)
            with self.archive.open(split.images.names[index]) as file:
                image = Image.open(file).convert("RGB").resize((size, size), Image.BILINEAR)
            planes = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
            x = (planes - mean) / std
            return (x, int(split.labels[index])) if labels else x

    return torch.utils.data.DataLoader(
        Images(),
        batch_size=BATCH,
        shuffle=labels,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


def plain_network(n_classes: int | None = None):
    import torch

    from featcache import load_weights
    from featcache.backbones.architectures import get_backbone
    from featcache.backbones.torch_engine import build_backbone, load_backbone

    network = build_backbone(get_backbone("resnet18"))
    load_backbone(network, load_weights(WEIGHTS).state)
    if n_classes:
        network.fc = torch.nn.Linear(512, n_classes)
    return network


def tutorial(
    zip_path: str, size: int, device: str, precision: str, form: dict, workers: int
) -> dict:
    import torch

    network = plain_network().eval().to(device)
    done = started = 0
    with torch.no_grad():
        for number, batch in enumerate(loader(zip_path, size, workers)):
            if number == form["warm_up"]:  # the workers are up, the kernels chosen
                started = time.perf_counter()
            elif number > form["warm_up"]:
                done += len(batch)
            network(batch.to(device)).cpu()
            if done and time.perf_counter() - started > form["seconds"]:
                break
    return {"images_per_s": done / (time.perf_counter() - started), "n": done}


def plain_loop(
    zip_path: str, size: int, device: str, precision: str, form: dict, workers: int
) -> dict:
    import torch

    network = plain_network(10).train().to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    criterion = torch.nn.CrossEntropyLoss()
    done = started = 0
    for number, (images, labels) in enumerate(loader(zip_path, size, workers, labels=True)):
        if number == form["warm_up"]:
            started = time.perf_counter()
        elif number > form["warm_up"]:
            done += len(images)
        loss = criterion(network(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        if done and time.perf_counter() - started > form["seconds"]:
            break
    return {"images_per_s": done / (time.perf_counter() - started), "n": done}


def training(zip_path: str, size: int, device: str, precision: str, form: dict, batch: int) -> dict:
    import featcache

    with tempfile.TemporaryDirectory() as folder:
        result = featcache.finetune(
            zip_path,
            "full",
            weights=WEIGHTS,
            size=size,
            engine="torch",
            device=device,
            precision=precision,
            epochs=2 if form["train"] > 1000 else 1,  # the first one chooses kernels too
            batch_size=batch,
            train_limit=form["train"],
            test_limit=64,
            runs=folder,
        )
    return {"images_per_s": result.images_per_s, "n": result.n_train}


def in_child(timeout_s: float, *arguments: object) -> dict:
    """Run one of the functions above in a process of its own; where it fails, say why."""
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"left_out": f"over {timeout_s:.0f} s"}
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        return {"left_out": f"exit code {answer.returncode}: {last}"}
    return json.loads(answer.stdout.splitlines()[-1])


def plan(form: dict, device: str) -> list[tuple[str, int, str, str, tuple]]:
    """Return what, side, kind, function and its last arguments; what the goals need comes first."""
    rows = []
    for size in form["sizes"]:
        rows.append(("bare, compiled", size, "bare", "bare", ()))
        rows.append(("featcache.extract, streamed", size, "extract", "extraction", ("zip",)))
        rows += [
            (f"DataLoader, {n} workers", size, "tutorial", "tutorial", (n,))
            for n in form["workers"]
        ]
        rows.append(("featcache.finetune, batch 64", size, "train", "training", (64,)))
        rows += [
            (f"plain loop, {n} workers", size, "plain loop", "plain_loop", (n,))
            for n in form["workers"]
        ]
    for size in form["sizes"]:
        rows.append(("featcache.extract, from RAM", size, "extract", "extraction", ("RAM",)))
        if device != "cpu":
            rows.append(
                ("featcache.extract, compiled", size, "extract", "extraction", ("compiled",))
            )
        rows.append(("featcache.finetune, batch 256", size, "train", "training", (256,)))
    return rows


def best(rows: list[dict], size: int, kind: str) -> float | None:
    rates = [
        row["images_per_s"]
        for row in rows
        if (row["size"], row["kind"]) == (size, kind) and "images_per_s" in row
    ]
    return max(rates, default=None)


def show(rows: list[dict], facts: dict, form_name: str) -> None:
    print(f"{facts['card']}, torch {facts['torch']}, {facts['cores']} cores, {facts['precision']}")
    if form_name == "small":
        print("Small form on the CPU: these figures say nothing about a GPU.")
    for row in rows:
        rate = f"{row['images_per_s']:10,.0f} img/s" if "images_per_s" in row else row["left_out"]
        whole = (
            f" ({row['whole_images_per_s']:,.0f} with all)" if "whole_images_per_s" in row else ""
        )
        print(f"{row['size']:4} px  {row['what']:30} {rate}{whole}")
    for size in dict.fromkeys(row["size"] for row in rows) if form_name == "whole" else ():
        for what, one, other, goal in (
            ("extraction of the bare pass", "extract", "bare", 0.8),
            ("extraction of the tutorial's way", "extract", "tutorial", 10.0),
            ("training of the plain loop", "train", "plain loop", 3.0),
        ):
            pair = best(rows, size, one), best(rows, size, other)
            if all(pair):
                print(f"{size:4} px  {what}: {pair[0] / pair[1]:.2f} times (goal: {goal:g})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="a zip of train/ and test/ with class folders")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="skip what has not started by then"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *arguments = json.loads(options.child)
        print(json.dumps(globals()[name](*arguments)))
        return
    if not options.data or not Path(options.data).is_file():
        parser.error("name a zip file of train/ and test/ with class folders")
    started = time.perf_counter()
    facts = in_child(CHILD_S, "machine")
    if "left_out" in facts:
        parser.error(f"torch or a package of featcache's is missing: {facts['left_out']}")
    form_name = "small" if facts["device"] == "cpu" else "whole"
    form = FORMS[form_name]
    rows = []
    for what, size, kind, function, rest in plan(form, facts["device"]):
        left_s = options.minutes * 60 - (time.perf_counter() - started)
        row = {"what": what, "size": size, "kind": kind}
        if left_s < 10:
            row["left_out"] = f"no time left of {options.minutes:g} minutes"
        else:
            given = (options.data, size, facts["device"], facts["precision"], form, *rest)
            row.update(in_child(min(CHILD_S, left_s), function, *given))
        rows.append(row)
        print(f"{size} px, {what}: {row.get('images_per_s', row.get('left_out'))}", file=sys.stderr)
    show(rows, facts, form_name)
    if options.json:
        found = {"form": form_name, "wall_s": time.perf_counter() - started, **facts, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
