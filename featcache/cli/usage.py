"""Wrong arguments: what is wrong in one line, and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

# Words that people try as commands, by what does that here.
_INSTEAD = {
    "extract": "cache compute create download embed embeddings encode features preprocess run",
    "probe": "benchmark classifier eval evaluate linear score sweep test",
    "probe, or featcache finetune": "train",
    "probe --knn 10": "knn neighbors neighbours",
    "probe --shots 1,5,25": "few-shot fewshot shots",
    "predict --head HEAD IMAGE": "apply classify infer inference",
    "search": "find nearest retrieve similar",
    "ship": "freeze onnx openvino package torchscript",
    "serve": "api daemon deploy http server web webapp",
    "info": "cat describe head inspect list ls show stats status summary",
    "audit": "clean dedup deduplicate duplicates outliers",
    "compare": "history leaderboard results runs",
    "report": "dashboard html plot tensorboard tsne ui umap view visualise visualize",
    "label": "annotate join labels table tag",
    "merge": "combine concat",
    "export": "convert dump save",
    "verify": "check fsck validate",
    "finetune": "lora tune",
    "backbones": "models networks timm weights",
    "doctor": "config debug devices env gpu init install login setup system",
}
_BOUNDS = {
    "greater_than": "expected more than {gt:g}",
    "greater_than_equal": "expected at least {ge:g}",
    "less_than": "expected less than {lt:g}",
    "less_than_equal": "expected at most {le:g}",
    "int_parsing": "expected a whole number",
    "float_parsing": "expected a number",
}


def unknown_command(word: str, commands: Iterable[str]) -> str:
    """Return what to say of a word that is no command."""
    from ..options import nearest

    instead = {one: command for command, words in _INSTEAD.items() for one in words.split()}
    instead |= {one: one for one in commands}
    name = nearest(word, instead)
    return f"no such command '{word}'" + (f"; try featcache {instead[name]}" if name else "")


def usage_message(error: Any) -> str:
    """Return what is wrong with the arguments, in one line."""
    import typer

    possible = getattr(error, "possibilities", None)
    if possible:
        return f"{error.message}; did you mean {possible[0]}?"
    if not isinstance(error, typer.BadParameter) or not error.message:
        return str(error.format_message()).removesuffix(".")
    reason = _reason(error)
    parameter = error.param
    if error.param_hint:
        return f"{error.param_hint}: {reason}"
    if parameter is None:
        return reason
    is_option = parameter.param_type_name == "option"
    return f"{parameter.opts[0] if is_option else parameter.metavar or parameter.name}: {reason}"


def _reason(error: Any) -> str:
    """Return why a value is refused; newer typers validate by pydantic."""
    from ..options import did_you_mean

    invalid = (getattr(error.__cause__, "errors", lambda: ())() or [{}])[0]
    kind, context = invalid.get("type"), invalid.get("ctx", {})
    reason = str(context.get("error", error.message)).removesuffix(".")
    choices = re.fullmatch(r"'(.*?)' is not one of (.*)", reason)
    if choices:
        return reason + did_you_mean(choices[1], re.findall(r"'(.*?)'", choices[2]))
    if kind in (None, "value_error"):
        return reason
    reason = _BOUNDS[kind].format_map(context) if kind in _BOUNDS else reason
    reason += f", found {invalid['input']!r}"
    if context.get("le", context.get("lt")) == 1 and float(invalid["input"]) <= 100:
        reason += f"; a percentage is written as a fraction: {float(invalid['input']) / 100:g}"
    return reason
