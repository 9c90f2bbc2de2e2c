"""Words and features in one space: search by text, and heads without training."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from backbone_models import add_pretrained_open_clip, add_tokenizer, save_hf

import featcache
from featcache.cli import main
from featcache.errors import DatasetError, RecipeError, ShapeMismatchError, WeightsError
from featcache.probes.zero_shot import read_prompts

TORCH = pytest.mark.torch
COLOURS = ("blue", "green", "red")


@pytest.fixture
def clouds(tmp_path):
    """Return a cache of three clouds around the axes of a space of four dimensions."""
    generator = np.random.default_rng(0)
    labels = np.arange(90) % 3
    return featcache.Cache.from_arrays(
        np.eye(4)[labels] + generator.normal(scale=0.4, size=(90, 4)),
        labels,
        class_names=COLOURS,
        splits=["train"] * 45 + ["test"] * 45,
        path=tmp_path / "clouds.h5",
    )


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def error_of(capsys, *words):
    """Run a command that fails; return the one line that it says."""
    capsys.readouterr()
    assert main([str(word) for word in words]) in (1, 2)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: "), said
    return said[0]


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_vectors_of_classes_are_a_head_beside_the_probe(clouds, tmp_path, capsys, suffix):
    generator = np.random.default_rng(1)
    vectors = 5 * np.eye(4)[:3] + generator.normal(scale=1.5, size=(3, 4))
    weight, path = unit(vectors), tmp_path / f"classes{suffix}"
    if suffix == ".npy":
        np.save(path, vectors)
    else:  # several of a class, of other lengths: averaged by direction
        more = vectors * [[3], [3], [3]] + generator.normal(size=(3, 4))
        pairs = {name: np.stack([vectors[i], more[i]]) for i, name in enumerate(COLOURS)}
        weight = unit((unit(vectors) + unit(more)) / 2)
        np.savez(path, **pairs)
    words = ["probe", str(clouds.path), "--zero-shot-vectors", str(path)]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    zero_shot = found["zero_shot"]
    right = (unit(clouds.test.features) @ weight.T).argmax(axis=1) == clouds.test.labels
    assert zero_shot["top1"] == pytest.approx(right.mean()) and 0.5 < right.mean() < 1
    assert zero_shot["n_vectors"] == (3 if suffix == ".npy" else 6)
    assert zero_shot["versus"]["n"] == 45
    assert zero_shot["versus"]["difference"] == pytest.approx(found["top1"] - right.mean())
    head = featcache.load_head(zero_shot["head"])
    assert head.scaling == "l2" and not head.bias.any()
    np.testing.assert_allclose(head.weight, 100 * weight, rtol=1e-5)
    assert featcache.evaluate_head(head, clouds).top1 == zero_shot["top1"]
    (record,) = (json.loads(one.read_text()) for one in tmp_path.rglob("run.json"))
    assert record["zero_shot"]["versus"] == zero_shot["versus"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "zero-shot" in shown and "McNemar" in shown and "zero-shot.safetensors" in shown


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (np.ones((2, 4)), ShapeMismatchError, r"expected vectors \(3, D\), .* found \(2, 4\)"),
        (np.ones((3, 5)), ShapeMismatchError, r"\(M, 4\) .*found float64 \(1, 5\)"),
        (np.zeros((3, 4)), ShapeMismatchError, "a direction"),
        (np.full((3, 4), np.nan), ShapeMismatchError, "finite numbers"),
        (dict.fromkeys(["blue", "gren", "red"], np.ones(4)), DatasetError, "did you mean green"),
        (dict.fromkeys(["blue", "red"], np.ones(4)), DatasetError, "found none of 'green' .1 miss"),
        ("classes.txt", DatasetError, "classes.txt: expected a text file"),
        ("classes.npz", DatasetError, "classes.npz: expected a .npz file"),
        (__file__, DatasetError, "expected classes of the cache, found"),
    ],
)
def test_wrong_classes_are_one_line(clouds, given, error, message):
    with pytest.raises(error, match=message) as caught:
        featcache.probe(clouds, zero_shot=given, C=1, check=False)
    assert "\n" not in str(caught.value)


def test_a_file_of_prompts(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("sea_lion\ncat\n")
    assert read_prompts(path, ("cat", "sea_lion")) == {
        "cat": ["a photo of a cat."],
        "sea_lion": ["a photo of a sea lion."],
    }
    path.write_bytes("\ufeffcat\ta cat\r\n\r\na drawing of {}\ncat\tone {}\n{}s\n".encode())
    assert read_prompts(path, ("cat", "dog")) == {
        "cat": ["a cat", "one cat"],
        "dog": ["a drawing of dog", "dogs"],
    }


def test_text_needs_a_model_with_a_text_tower(clouds, image_folder, tmp_path, capsys):
    said = error_of(capsys, "search", clouds.path, "--text", "a red car")
    assert "text tower" in said and "found 'imported'" in said and ".npy" in said
    made = featcache.extract(
        image_folder, weights="tinyimagenet32", size=32, output=tmp_path / "c.h5"
    )
    (tmp_path / "classes.txt").write_text("{}\n")
    said = error_of(capsys, "probe", made.cache, "--zero-shot", tmp_path / "classes.txt")
    assert "text tower" in said and "found 'resnet18'" in said
    with pytest.raises(RecipeError, match="expected encode to read texts"):
        featcache.probe(made.cache, zero_shot=tmp_path / "classes.txt")
    with pytest.raises(RecipeError, match="expected no zero_shot"):
        featcache.probe(made.cache, zero_shot=np.ones((3, 512)), cv=2)
    assert main(["probe", str(made.cache), "--backbone", "x"]) == 2
    assert "has no effect without --zero-shot" in capsys.readouterr().err


class Clip:
    """A tiny CLIP: its name, and what its own library makes of texts."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder / "clip"
        if kind == "open_clip":
            self.backbone = add_pretrained_open_clip(self.folder)
        else:
            self.backbone = str(add_tokenizer(save_hf(self.folder, kind)))
        self.cuts = "pooled" if kind == "siglip" else "pooled,projected"

    def texts(self, texts):
        import torch

        with torch.inference_mode():
            if self.kind == "open_clip":
                import open_clip

                model = open_clip.create_model("featcache-words", pretrained="local").eval()
                return model.encode_text(open_clip.get_tokenizer("featcache-words")(texts)).numpy()
            import transformers

            model = transformers.AutoModel.from_pretrained(self.folder).eval()
            read = transformers.AutoTokenizer.from_pretrained(self.folder)
            padding = {"padding": "max_length", "truncation": True, "max_length": 8}
            found = model.get_text_features(**read(texts, return_tensors="pt", **padding))
            return found.pooler_output.numpy()


@pytest.fixture
def clip(request, image_folder, tmp_path):
    """Return a CLIP and a cache of its features."""
    clip = Clip(request.param, tmp_path)
    made = featcache.extract(
        image_folder,
        backbone=clip.backbone,
        cut=clip.cuts,
        engine="torch",
        output=tmp_path / "c.h5",
    )
    return clip, made.load()


@TORCH
@pytest.mark.parametrize("clip", ["clip", "siglip", "open_clip"], indirect=True)
def test_texts_and_images_meet_as_in_the_models_own_library(clip, image_folder, tmp_path, capsys):
    clip, cache = clip
    texts = ["a red car", "green"]
    cut = clip.cuts.split(",")[-1]
    images = unit(np.concatenate([split.cut(cut) for _, split in cache.splits()]))
    ids = [name for _, split in cache.splits() for name in split.ids]
    cosine = unit(clip.texts(texts)) @ images.T
    page, table = tmp_path / "page.html", tmp_path / "found.csv"
    words = ["search", cache.path, "--text", texts[0], "--text", texts[1], "-k", "3"]
    words += ["--backbone", clip.backbone, "--csv", table, "--json", "--html", page]
    words += [image_folder / ids[0]]
    assert main([str(word) for word in words]) == 0
    image, *queries = json.loads(capsys.readouterr().out)["queries"]
    assert image["neighbours"][0]["similarity"] > 0.99999  # in the same cut
    for query, text, wanted in zip(queries, texts, cosine, strict=True):
        assert (query["name"], query["kind"]) == (text, "text")
        near = [one["similarity"] for one in query["neighbours"]]
        np.testing.assert_allclose(near, np.sort(wanted)[::-1][:3], atol=1e-5)
        first = ids.index(query["neighbours"][0]["id"])
        assert wanted[first] == pytest.approx(wanted.max(), abs=1e-5)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["kind"] for row in rows] == ["image"] * 3 + ["text"] * 6
    assert texts[0] in page.read_text()

    (tmp_path / "classes.txt").write_text("a drawing of {}\na {} car\n")
    words = ["probe", cache.path, "--zero-shot", tmp_path / "classes.txt", "--json", "--no-check"]
    assert main([str(word) for word in [*words, "--backbone", clip.backbone]]) == 0
    found = json.loads(capsys.readouterr().out)["zero_shot"]
    both = [clip.texts([f"a drawing of {name}", f"a {name} car"]) for name in cache.class_names]
    weight = unit([unit(rows).mean(axis=0) for rows in both])
    right = (unit(cache.test.cut(cut)) @ weight.T).argmax(axis=1) == cache.test.labels
    assert (found["top1"], found["n_vectors"], found["cut"]) == (right.mean(), 6, cut)
    (said,) = featcache.predict(image_folder / ids[0], found["head"], backbone=clip.backbone)
    scores = 100 * weight @ unit(cache.train.cut(cut)[0])
    assert said.class_name == cache.class_names[scores.argmax()]


@TORCH
@pytest.mark.parametrize("clip", ["clip"], indirect=True)
def test_other_weights_cuts_and_tokenizers_are_refused(clip, image_folder, tmp_path, capsys):
    clip, cache = clip
    by_text = ["search", cache.path, "--text", "red", "--backbone"]
    # A cache names no folder of this machine.
    assert "--backbone" in error_of(capsys, *by_text[:-1])
    made = featcache.extract(
        image_folder, backbone=clip.backbone, engine="torch", output=tmp_path / "pooled.h5"
    )
    said = error_of(capsys, "search", made.cache, *by_text[2:], clip.backbone)
    assert "expected the cut 'projected'" in said and "--cut pooled,projected" in said
    with pytest.raises(RecipeError, match="text: expected words"):
        featcache.search(cache, text=["red", " "], backbone=clip.backbone)
    (clip.folder / "tokenizer.json").unlink()
    assert "expected the tokenizer" in error_of(capsys, *by_text, clip.backbone)
    other = save_hf(tmp_path / "other" / "clip", "clip")
    import safetensors.torch

    state = safetensors.torch.load_file(other / "model.safetensors")
    state["visual_projection.weight"] += 0.1
    safetensors.torch.save_file(state, other / "model.safetensors", {"format": "pt"})
    assert "weights that made its features" in error_of(capsys, *by_text, other)
    named = save_hf(tmp_path / "vit", "vit")
    with pytest.raises(WeightsError, match="expected texts by the model of its features"):
        featcache.text_features(cache, ["red"], backbone=named)
