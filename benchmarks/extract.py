"""The speed of extraction end to end, compared with the bare engine and with other tools.

    python benchmarks/extract.py CIFAR10.zip [--size 64] [--images 60000] [--rounds 3] \\
        [--other-python PYTHON …] [--json FILE]
    python benchmarks/extract.py CIFAR10.zip --memory
    python benchmarks/extract.py CIFAR10.zip --outside

CIFAR10.zip holds train/ and test/ with class folders. In turn, each in a process of its own:

- the tutorial, if OneFlow is installed: flowvision's ResNet-18, its DataLoader, PIL transforms;
- featcache with each engine and precision available here (or --only some), bare: on
  uint8 arrays in memory, without decoding or writing; before and after the next one, since the
  speed of a machine drifts;
- the same end to end: `featcache.extract`, from opening the zip to a verified cache (including
  decoding, checksums, loading the engine and packing);
- with --other-python, an interpreter that has torch or onnxruntime: their bare forward pass, on a
  network built from the same checkpoint.

Prints images per second and the fraction of the bare speed reached end to end, each as the median
of the rounds with the least and the greatest, and the ratio to the tutorial. Slow contenders run on
fewer images (the column n). --memory extracts the zip once and ten times over (600,000 images, at
32 pixels) and prints the peak resident memory. --outside extracts with an engine that costs
nothing, and then again with nothing to do; it prints processor milliseconds per image, all threads
together, which other load on the machine changes less than the time on the wall. If a GPU can be
used, the table includes it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

WEIGHTS = "tinyimagenet32"
BARE_IMAGES = 2048
TUTORIAL_S = 30  # enough for a rate; the whole would take hours at 224 pixels


def subset(zip_path: str, n_images: int):
    """Return the data set, or so many of its images: five training for each test image."""
    import numpy as np

    from featcache import load_dataset
    from featcache.datasets.dataset import Dataset

    data = load_dataset(zip_path)
    if n_images >= len(data.train) + len(data.test):
        return data
    generator = np.random.default_rng(0)
    splits = {
        role: split.take(np.sort(generator.choice(len(split), share, replace=False)))
        for (role, split), share in zip(
            data.splits(), (n_images * 5 // 6, n_images - n_images * 5 // 6), strict=True
        )
    }
    return Dataset(data.name, splits["train"], splits["test"], "a part")


def tutorial(zip_path: str, size: int, n_images: int) -> dict:
    from featcache import frameworks as _oneflow
    from featcache.frameworks import import_oneflow

    # As the tutorial imports it: without the name of the processor's kernels, which featcache sets.
    _oneflow.openblas_core_type = lambda: None
    flow = import_oneflow()
    import flowvision
    from flowvision import transforms

    from featcache import load_weights

    data = subset(zip_path, n_images).train
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
            return transform(data.images[index])

    model = flowvision.models.resnet18(num_classes=200)
    model.load_state_dict(dict(load_weights(WEIGHTS).state))
    model.fc = flow.nn.Identity()
    model.eval()
    loader = flow.utils.data.DataLoader(Images(), batch_size=64, num_workers=0)
    started, done = time.perf_counter(), 0
    with flow.no_grad():
        for batch in loader:
            done += len(model(batch).numpy())
            if time.perf_counter() - started > TUTORIAL_S:
                break
    return {"images_per_s": done / (time.perf_counter() - started), "n": done}


def bare(zip_path: str, size: int, engine: str, precision: str, device: str) -> dict:
    from featcache import load_weights
    from featcache.backbones.choice import choose_engine
    from featcache.backbones.engine import build_engine, start

    weights = load_weights(WEIGHTS, size=size)
    split = subset(zip_path, 10**9).train
    rows = range(0, len(split), len(split) // BARE_IMAGES)[:BARE_IMAGES]
    pixels = weights.preprocess.compact([split.images[row] for row in rows])
    runner = build_engine(choose_engine(engine, device, precision), weights)
    batch = runner.batch_size
    runner.extract(pixels[:batch])
    started, done = time.perf_counter(), 0
    # As the pipeline does: a batch starts before the one before it has ended.
    waiting = start(runner, pixels[:batch])
    for first in itertools.cycle(range(0, len(pixels), batch)):
        waited, waiting = waiting, start(runner, pixels[first : first + batch])
        done += len(waited()["avgpool"])
        if time.perf_counter() - started > 12:
            break
    return {"images_per_s": done / (time.perf_counter() - started), "n": done}


def end_to_end(
    zip_path: str, size: int, engine: str, precision: str, device: str, n_images: int
) -> dict:
    import featcache

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = featcache.extract(
            zip_path if n_images >= 60_000 else subset(zip_path, n_images),
            weights=WEIGHTS,
            size=size,
            engine=engine,
            precision=precision,
            device=device,
            output=folder,
            reuse=False,
        )
        featcache.verify(result.cache)
        wall = time.perf_counter() - started
        stages = result.load().meta["stages_s"]
    return {"images_per_s": result.n_rows / wall, "n": result.n_rows, "stages_s": stages}


def memory(zip_path: str, times: int) -> dict:
    import resource

    import numpy as np

    import featcache
    from featcache.datasets.dataset import Dataset, Split
    from featcache.datasets.images import FileImages

    data = featcache.load_dataset(zip_path)

    def repeated(split: Split) -> Split:
        names = [name for _ in range(times) for name in split.images.names]
        ids = tuple(f"{turn}/{name}" for turn in range(times) for name in split.ids)
        labels = np.tile(split.labels, times)
        return Split(FileImages(split.images.files, names), labels, split.class_names, ids)

    data = Dataset(data.name, repeated(data.train), repeated(data.test), f"{times} times")
    with tempfile.TemporaryDirectory() as folder:
        result = featcache.extract(data, weights=WEIGHTS, size=32, output=folder, reuse=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"n": result.n_rows, "peak_mib": peak, "images_per_s": result.images_per_s}


def outside(zip_path: str, size: int, n_images: int) -> dict:
    import numpy as np

    import featcache
    from featcache.extraction import extract

    class Nothing:
        batch_size = 512

        def extract(self, images):
            return {"avgpool": np.zeros((len(images), 512), np.float32)}

    extract.build_engine = lambda *_, **__: Nothing()
    data = zip_path if n_images >= 60_000 else subset(zip_path, n_images)
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name in ("cpu_ms", "again_cpu_ms"):
            started = time.process_time()
            result = featcache.extract(
                data, weights=WEIGHTS, size=size, engine="openvino", output=folder, reuse=False
            )
            found[name] = 1e3 * (time.process_time() - started) / result.n_rows
        found["decoding_cpu_ms"] = 1e3 * result.load().meta["stages_s"]["decoding_cpu_s"]
    found["decoding_cpu_ms"] /= result.n_rows
    return {"n": result.n_rows, **found}


OTHER = """
import json, sys, time
import numpy as np
arrays, size, kind = dict(np.load(sys.argv[1])), int(sys.argv[2]), sys.argv[3]
import torch
from torch import nn
torch.set_num_threads(int(sys.argv[4]))

class Block(nn.Module):
    def __init__(self, into, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False); self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False); self.bn2 = nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(
            nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)
        ) if stride > 1 else nn.Identity()
    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.downsample(x))

class ResNet18(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False); self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = (64, 64, 128, 256, 512)
        for k in range(1, 5):
            setattr(self, f"layer{k}", nn.Sequential(
                Block(widths[k - 1], widths[k], 2 if k > 1 else 1), Block(widths[k], widths[k], 1)))
    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))

model = ResNet18().eval()
state = {k: torch.from_numpy(v) for k, v in arrays.items() if not k.startswith("fc.")}
model.load_state_dict(state)
x = torch.randn(64, 3, size, size)
if kind == "onnxruntime":
    import io, onnxruntime
    stream = io.BytesIO()
    torch.onnx.export(model, x, stream, input_names=["x"], dynamo=False)
    options = onnxruntime.SessionOptions(); options.intra_op_num_threads = int(sys.argv[4])
    session = onnxruntime.InferenceSession(stream.getvalue(), options, ["CPUExecutionProvider"])
    pixels = x.numpy()
    work = lambda: session.run(None, {"x": pixels})
else:
    if torch.cuda.is_available():
        model, x = model.cuda(), x.cuda()
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    def work():
        with torch.inference_mode(), torch.autocast(
            x.device.type, torch.bfloat16, enabled=kind == "torch-bf16"
        ):
            model(x).float().cpu()
work()
started, done = time.perf_counter(), 0
while time.perf_counter() - started < 15:
    work(); done += 64
print(json.dumps({"images_per_s": done / (time.perf_counter() - started), "n": done}))
"""


def other(python: str, kind: str, size: int) -> dict | None:
    """Measure another framework's forward pass, or say why it is not there."""
    import numpy as np

    from featcache import load_weights
    from featcache.cores import usable_cores

    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "weights.npz"
        np.savez(arrays, **load_weights(WEIGHTS).state)
        answer = subprocess.run(
            [python, "-c", OTHER, arrays, str(size), kind, str(usable_cores())],
            capture_output=True,
            text=True,
        )
    if answer.returncode:
        print(f"{kind}: {answer.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(answer.stdout)


def in_child(*arguments: object) -> dict:
    """Run one of the functions above in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


def contenders() -> list[tuple[str, str, str]]:
    """Return (engine, precision, device) of everything that runs here."""
    from featcache.backbones.choice import PRECISIONS, choose_engine
    from featcache.errors import EngineUnavailableError
    from featcache.frameworks import may_have_gpu

    found = []
    on_gpu = [("oneflow", "cuda"), ("torch", "cuda"), ("torch", "mps")] if may_have_gpu() else []
    for engine, device in (*on_gpu, ("openvino", "cpu"), ("torch", "cpu"), ("oneflow", "cpu")):
        for precision in PRECISIONS:
            try:
                choose_engine(engine, device, precision)
            except EngineUnavailableError as error:
                print(f"left out: {error}", file=sys.stderr)
            else:
                found.append((engine, precision, device))
    return found


def compare(options: argparse.Namespace) -> list[dict]:
    from featcache.frameworks import oneflow_status

    rows: list[dict] = []

    def measured(what: str, kind: str, *arguments: object, **known: object) -> float:
        rows.append({"what": what, "kind": kind, **in_child(*arguments), **known})
        print(f"{what}, {kind}: {rows[-1]['images_per_s']:.1f} img/s", file=sys.stderr, flush=True)
        return rows[-1]["images_per_s"]

    def is_asked(name: str) -> bool:
        return not options.only or any(part in name for part in options.only)

    here = [one for one in contenders() if is_asked(" ".join(one))]
    for _ in range(options.rounds):
        slow = min(options.images, 12_000 * 64 * 64 // options.size**2)
        place = options.data, options.size
        if oneflow_status()[0] is not None and is_asked("tutorial"):
            measured("the tutorial", "tutorial", "tutorial", *place, slow)
        for one in here:
            engine, precision, device = one
            what = f"featcache {engine} {precision} {device}"
            n = slow if (engine, device) == ("oneflow", "cpu") else options.images
            before = measured(what, "bare", "bare", *place, *one)
            measured(what, "end to end", "end_to_end", *place, *one, n)
            reached = rows[-1]
            after = measured(what, "bare", "bare", *place, *one)
            reached["of_bare"] = reached["images_per_s"] / ((before + after) / 2)
        for python in options.other_python:
            for kind in ("torch", "torch-bf16", "onnxruntime"):
                found = other(python, kind, options.size)
                if found:
                    rows.append({"what": kind, "kind": "bare", **found})
    return rows


def show(rows: list[dict], size: int) -> None:
    def of(what: str, kind: str, name: str) -> list[float]:
        found = [row for row in rows if (row["what"], row["kind"]) == (what, kind)]
        return sorted(row[name] for row in found if name in row)

    slowest = of("the tutorial", "tutorial", "images_per_s")
    print(f"ResNet-18 at {size} px on {processor()}: median (least to greatest)")
    print(f"{'':40} {'n':>7} {'img/s':>24} {'% of bare':>18} {'x tutorial':>10}")
    for what, kind in dict.fromkeys((row["what"], row["kind"]) for row in rows):
        rates, shares = of(what, kind, "images_per_s"), of(what, kind, "of_bare")
        n = max(of(what, kind, "n"))
        name = what if kind == "tutorial" else f"{what}, {kind}"
        share = spread([100 * share for share in shares]) if shares else ""
        times = f"{median(rates) / median(slowest):.1f}" if slowest else ""
        print(f"{name:40} {n:7,} {spread(rates):>24} {share:>18} {times:>10}")


def spread(values: list[float]) -> str:
    return f"{median(values):,.0f} ({values[0]:,.0f} to {values[-1]:,.0f})"


def processor() -> str:
    """Return how many cores of which processor this machine has."""
    from featcache.cores import usable_cores

    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{usable_cores()} cores of {names[0] if names else platform.processor()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="a zip of train/ and test/ with class folders")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="such as tutorial 'openvino f32' bf16")
    parser.add_argument("--other-python", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--outside", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *arguments = json.loads(options.child)
        print(json.dumps(globals()[name](*arguments)))
    elif options.memory:
        for times in (1, 10):
            found = in_child("memory", options.data, times)
            print(
                f"{found['n']:9,} images: peak {found['peak_mib']:.0f} MiB, "
                f"{found['images_per_s']:.0f} img/s at 32 px"
            )
    elif options.outside:
        for _ in range(options.rounds):
            found = in_child("outside", options.data, options.size, options.images)
            print(
                f"{found['n']:,} images: {found['cpu_ms']:.3f} ms of a core each outside the "
                f"engine (of these {found['decoding_cpu_ms']:.3f} to read and decode), "
                f"{found['again_cpu_ms']:.4f} with nothing to do"
            )
    else:
        rows = compare(options)
        show(rows, options.size)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
