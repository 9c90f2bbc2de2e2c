"""Results in a notebook: tables of well-formed HTML, in which names are text."""

from __future__ import annotations

from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import write_gaussian_cache
from test_comparison import record_of

import featcache
from featcache.extraction.result import ExtractResult
from featcache.finetuning.fit import Attempt, FitResult
from featcache.finetuning.recipes import FINETUNE_RECIPES
from featcache.finetuning.run import Epoch, FinetuneResult
from featcache.notebook import Rows, ShownAsTable

HOSTILE = "<script>alert('x')</script> & \"y\" \N{GRINNING FACE} שלום"


class Reader(HTMLParser):
    """Collects the cells of tables; every tag must be closed in its turn."""

    ALLOWED = frozenset(("table", "caption", "thead", "tbody", "tr", "th", "td", "p"))

    def __init__(self, text):
        super().__init__()
        self.open, self.cells = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert tag in self.ALLOWED and {name for name, _ in attributes} <= {"scope"}
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        assert self.open, "text outside a table"
        if self.open[-1] in ("td", "th"):
            self.cells[-1] += text


def cells(result):
    return Reader(result._repr_html_()).cells


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("notebook") / "g.h5"
    return featcache.load(write_gaussian_cache(path, dataset=HOSTILE))


def test_a_cache_shows_what_it_holds(cache):
    shown = cells(cache)
    assert "120 train, 60 test" in shown and HOSTILE in shown and cache.fingerprint in shown


def test_results_on_a_cache(cache):
    probed = featcache.probe(cache, check=False)
    shown = cells(probed)
    assert shown[shown.index("top1") + 1] == f"{probed.top1:.6g}"
    assert str(probed.head) in shown and "check" in shown
    (point,) = points = featcache.few_shot(cache, shots=(2,), seeds=2)
    assert cells(points)[:3] == ["n_train", "shots", "scores"]
    assert cells(points)[8:10] == ["6", "2"] and "6" in cells(point)
    votes = featcache.knn(cache, ks=(1, 5))
    assert cells(votes).count("60") == 2 and "k" in cells(votes[0])
    assert HOSTILE in cells(featcache.compare())


def test_results_of_long_work():
    tuned = FinetuneResult(
        method="split",
        top1=0.5,
        top1_interval=(0.4, 0.6),
        epochs=(Epoch(1, 2.0, 0.4, 3.0), Epoch(2, 1.5, 0.5, 3.0)),
        curve_split="test",
        best_epoch=2,
        images_per_s=9.0,
        wall_s=6.0,
        checkpoint=Path("m.safetensors"),
        n_train=10,
        n_val=0,
        n_test=5,
        seed=0,
        recipe=FINETUNE_RECIPES["split"],
        cache=None,
        init_head=HOSTILE,
        resumed=False,
        run=Path("run"),
        engine="oneflow",
        device="cpu",
        precision="f32",
    )
    shown = cells(tuned)
    assert HOSTILE in shown and {"train_loss", "1.5", "0.4"} <= set(shown), "the epochs as a table"
    tried = Attempt(HOSTILE, "done", "why", 1.0, 2.0, None)
    fitted = FitResult(
        0.9, False, HOSTILE, 0.5, 0.5, (0.4, 0.6), 9, 3, 4, Path("h"), (tried,), "more", 9.0
    )
    assert cells(fitted).count(HOSTILE) == 2
    made = ExtractResult(
        Path(HOSTILE),
        True,
        9,
        0,
        0,
        0,
        0,
        9,
        8,
        "fake",
        "cpu",
        "f32",
        1.0,
        9.0,
        "engine",
        "f" * 64,
        "why",
    )
    assert HOSTILE in cells(made) and "True" in cells(made)


@dataclass(frozen=True)
class Odd(ShownAsTable):
    value: object


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),  # noqa: RUF001
        (True, "True"),
        (1234567, "1,234,567"),
        (0.123456789, "0.123457"),
        (float("nan"), "nan"),
        ((0.25, 0.5), "0.25, 0.5"),
        (tuple(range(9)), "9 values"),
        (((1, 2), (3, 4)), "2 values"),
        ((), ""),
        ({"a": 1, "b": {"c": 2}}, "a: 1, b: c: 2"),
        ("x\udcff", "x\\udcff"),
        ("y" * 500, "y" * 400 + "…"),
    ],
)
def test_values_in_few_words(value, shown):
    assert cells(Odd(value)) == ["value", shown]


def test_rows_are_a_list_and_long_ones_are_cut():
    rows = Rows([record_of(str(number)) for number in range(61)], ("run", "missing"))
    assert isinstance(rows, list) and rows[0]["run"] == "0"
    assert cells(rows)[:4] == ["run", "missing", "0", "–"]  # noqa: RUF001
    assert "and 1 more" in rows._repr_html_() and len(cells(rows)) == 2 * 61
    assert cells(Rows()) == []
