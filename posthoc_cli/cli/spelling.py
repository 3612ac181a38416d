"""How the command line spells what the library calls its arguments: `only=` is `--only`.

The library's messages name arguments as a Python caller writes them: `only=`, `raw=True`,
`method='blup'`, `profiles=[0.05, 0.10]`. A user of the command sees options in their place.
"""

from __future__ import annotations

import re

from posthoc_cli.errors import PosthocError, brief

_SAME = (
    *("copy", "decay", "device", "drop", "dtype", "ema_decay", "exclude", "force", "gamma"),
    *(
        "half_life",
        "keyframe_every",
        "key",
        "layout",
        "lora",
        "lora_rank",
        "lora_tolerance",
        "lr_decay",
        "max_error",
        "window",
    ),
    *("max_shard_size", "method", "only", "pattern", "profiles", "raw", "run", "sigma_rel"),
    *("also", "evaluations", "gpus", "seed", "journal", "metric", "metric_json", "metric_regex"),
    *("parallel", "parameter", "range", "repeats", "timeout", "tolerance", "workdir"),
    *("skip_existing", "skip_incomplete", "step", "strict", "target_for", "update_every"),
)
OPTIONS = {"output": "-o", "tool": "--from"} | {
    name: "--" + name.replace("_", "-") for name in _SAME
}
"""The option of each argument."""

# Quoted names of files come first: what looks like an argument within them is none.
_ARGUMENT = re.compile(
    r"(?<!\w)'[^']*'(?!\w)|(?<![\w.=/-])(?P<name>"
    + "|".join(OPTIONS)
    + r")=(?:True\b|'(?P<text>[^']*)'|\[(?P<list>[^\]]*)\]|(?P<plain>\w[\w.:]*))?"
)


def spelled(text: str) -> str:
    """`text` of a message with options in place of arguments."""
    return _ARGUMENT.sub(_option, text).replace("estimate_methods()", "solve --diagnose")


def spelled_error(error: PosthocError) -> PosthocError:
    subject = error.subject
    if match := _ARGUMENT.fullmatch(subject):
        subject = _option(match)
    return type(error)(subject, spelled(brief(error.problem)), spelled(error.remedy))


def _option(match: re.Match[str]) -> str:
    if match["name"] is None:
        return match[0]
    option = OPTIONS[match["name"]]
    if match["text"] is not None:
        quoted = re.search(r"[^\w@%+=:,./-]", match["text"])  # by a shell it would be read
        return f"{option} '{match['text']}'" if quoted else f"{option} {match['text']}"
    if match["list"] is not None:
        return f"{option} {match['list'].replace(', ', ',')}"
    return f"{option} {match['plain']}" if match["plain"] else option
