"""Backbones of any library: speed against timm's own loop, and each kind once with its probe.

    python benchmarks/backbones.py CIFAR10.zip [--precision f32 bf16] [--json FILE]
    python benchmarks/backbones.py CIFAR10.zip --every [--images 1000] [--json FILE]

CIFAR10.zip holds train/ and test/ with class folders of JPEG files. Needs PyTorch and timm; --every
takes what is installed of the other libraries. Weights are random where no others can be had, which
changes no speed.

The first form measures ResNet-18, EfficientNet-Lite0, ViT-S/16 and ConvNeXt-Tiny at their own
sizes, in turn, on the same cores: timm's plain loop (a DataLoader with
timm's transform and as many workers as cores, eval forward under inference_mode, autocast for
bf16), and in another process, three times in turn, featcache's engine bare (on pixels in memory)
and `featcache.extract` from the zip to a cache. Rates are medians and leave out what comes before
the first image: imports, weights, compiling.

The second form extracts features of a draw of images with every kind of backbone that can run here,
and probes them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

SPEED = ("resnet18", "efficientnet_lite0", "vit_small_patch16_224", "convnext_tiny")
LOOP_S, BARE_S, WHOLE_S, ROUNDS = 12, 5, 8, 3
# Every kind of backbone, the weights that can be had without a model hub, and the size.
KINDS = (
    ("resnet18", "tinyimagenet32", None),
    ("featcache.backbones.efficientnet_lite:lite0", None, None),
    ("timm:efficientnet_lite0", "random:0", None),
    ("timm:vit_small_patch16_224", "random:0", None),
    ("timm:convnext_tiny", "random:0", None),
    ("timm:vit_small_patch14_dinov2", "random:0", 224),
    ("torchvision:mobilenet_v3_small", "random:0", None),
    ("open_clip:ViT-B-32", "random:0", None),
    ("hf", None, None),
    ("flowvision:mobilenet_v2", "random:0", 64),
    ("onnx", None, None),
    ("pt2", None, None),
)


def draw(zip_path: str, n_images: int):
    """Return a stratified draw of the data set: four training images for each test image."""
    from featcache import load_dataset

    return load_dataset(zip_path).limited(n_images * 4 // 5, n_images // 5)


def timm_loop(zip_path: str, name: str, precision: str, n_images: int) -> dict:
    import timm
    import torch

    from featcache.cores import usable_cores

    images = draw(zip_path, n_images).train.images
    model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            return transform(images[index])

    cores = usable_cores()
    torch.set_num_threads(cores)
    loader = torch.utils.data.DataLoader(Images(), batch_size=32, num_workers=cores)
    narrow = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    done, started = 0, time.perf_counter()
    with torch.inference_mode(), narrow:
        for batch in loader:
            done += len(model(batch).float().numpy())
            if time.perf_counter() - started > LOOP_S:
                break
    return {"images_per_s": done / (time.perf_counter() - started), "n": done}


def ours(zip_path: str, name: str, precision: str, n_images: int) -> dict:
    """Alternate between the bare engine and an extraction, each on this many seconds' images."""
    import featcache
    from featcache import load_weights
    from featcache.backbones.choice import choose_engine
    from featcache.backbones.engine import build_engine, settled

    weights = load_weights("random:0", f"timm:{name}")
    split = draw(zip_path, 1000).train
    choice = choose_engine("auto", "auto", precision, weights.engines)
    choice = settled(choice, weights, ("pooled",))
    pixels = weights.preprocess.compact([split.images[row] for row in range(256)])
    engine = build_engine(choice, weights)
    batch = engine.batch_size
    engine.extract(pixels[:batch])
    rounds = []
    for _ in range(ROUNDS):
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < BARE_S:
            for start in range(0, len(pixels), batch):
                done += len(engine.extract(pixels[start : start + batch])["pooled"])
        alone = done / (time.perf_counter() - started)
        with tempfile.TemporaryDirectory() as folder:
            result = featcache.extract(
                draw(zip_path, max(200, round(WHOLE_S * alone))),
                backbone=f"timm:{name}",
                weights="random:0",
                precision=precision,
                output=folder,
                reuse=False,
            )
        rounds.append({"bare": alone, "whole": result.images_per_s, "n": result.n_rows})
    return {"engine": choice.name, "rounds": rounds}


def probed(zip_path: str, backbone: str, weights: str, size: str, n_images: int) -> dict:
    """Extract with one backbone and probe; "hf", "onnx" and "pt2" are made here."""
    import featcache

    with tempfile.TemporaryDirectory() as folder:
        source = made_here(backbone, Path(folder))
        result = featcache.extract(
            draw(zip_path, n_images),
            backbone=source,
            weights=None if weights == "None" else weights,
            size=None if size == "None" else int(size),
            output=folder,
        )
        probe = featcache.probe(result.cache, check=False, runs=Path(folder) / "runs")
    return {
        "engine": result.engine,
        "features": result.feature_dim,
        "images_per_s": result.images_per_s,
        "top1": probe.top1,
        "interval": probe.top1_interval,
        "n": result.n_rows,
    }


def made_here(backbone: str, folder: Path) -> str:
    if backbone == "hf":
        import torch
        import transformers

        torch.manual_seed(0)
        config = transformers.Dinov2Config(image_size=224, patch_size=14, hidden_size=384)
        config.num_attention_heads = 6
        transformers.Dinov2Model(config).save_pretrained(folder / "dinov2-small")
        return f"hf:{folder / 'dinov2-small'}"
    if backbone in ("onnx", "pt2"):
        import torch

        from featcache.backbones import efficientnet_lite

        network = efficientnet_lite.lite0().eval()
        example = torch.zeros(2, 3, 224, 224)
        path = folder / f"lite0.{backbone}"
        if backbone == "pt2":
            torch.export.save(torch.export.export(network, (example,)), path)
        else:
            torch.onnx.export(
                network, (example,), str(path), dynamo=False, dynamic_axes={"input": {0: "n"}},
                input_names=["input"], output_names=["features"],
            )  # fmt: skip
        preprocess = network.preprocess.as_dict()
        kept = {key: preprocess[key] for key in ("size", "mean", "std", "interpolation")}
        path.with_suffix(".json").write_text(json.dumps(kept))
        return str(path)
    return backbone


PARTS = {"timm": timm_loop, "ours": ours, "probe": probed}


def in_child(part: str, *words: object) -> dict:
    command = [sys.executable, __file__, "--part", part, *map(str, words)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        return {"problem": (child.stderr.strip().splitlines() or ["no message"])[-1][:160]}
    return json.loads(child.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--part"]:
        part, *words = sys.argv[2:]
        print(json.dumps(PARTS[part](*words[:-1], int(words[-1]))))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("zip")
    parser.add_argument("--images", type=int)
    parser.add_argument("--precision", nargs="+", default=["f32"])
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = every(options) if options.every else speeds(options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def speeds(options: argparse.Namespace) -> list[dict]:
    rows = []
    print(f"{'backbone':24}{'':6}{'timm':>8}{'bare':>8}{'whole':>8}  of bare  of timm")
    for precision in options.precision:
        for name in SPEED:
            row = {"backbone": name, "precision": precision}
            for part in ("ours", "timm"):
                row[part] = in_child(part, options.zip, name, precision, 10_000)
            rows.append(row)
            rounds = row["ours"].get("rounds")
            if not rounds or "problem" in row["timm"]:
                print(name, precision, row)
                continue
            alone, whole = (median(one[key] for one in rounds) for key in ("bare", "whole"))
            share = median(one["whole"] / one["bare"] for one in rounds)
            loop = row["timm"]["images_per_s"]
            print(
                f"{name:24}{precision:6}{loop:8.1f}{alone:8.1f}{whole:8.1f}"
                f"{share:8.0%}{whole / loop:8.2f} x",
                flush=True,
            )
    return rows


def every(options: argparse.Namespace) -> list[dict]:
    rows = []
    for backbone, weights, size in KINDS:
        found = in_child("probe", options.zip, backbone, weights, size, options.images or 1000)
        rows.append({"backbone": backbone, "weights": weights, "size": size, **found})
        if "problem" in found:
            print(f"{backbone:46}{found['problem']}", flush=True)
            continue
        low, high = found["interval"]
        print(
            f"{backbone:46}{weights or 'its own':16}{found['engine']:10}{found['features']:6}"
            f"{found['images_per_s']:9.1f} img/s  top-1 {100 * found['top1']:.1f} % "
            f"({100 * low:.1f} to {100 * high:.1f})",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
