"""What the experiments of `paper` share: the prior, the prompts, and the end of a report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill3d.cli.bench import prompts_from
from distill3d.cli.settings import nested
from distill3d.cli.shared import Model, on_terminal

if TYPE_CHECKING:
    from distill3d.bench.tables import Table
    from distill3d.evaluation.evaluator import Evaluator
    from distill3d.runs.config import PriorConfig
    from distill3d.types import Prior


def prior_config(model: Model, prior: str, dtype: str = "auto") -> PriorConfig:
    """Which prior, and where it runs; `prior` and `dtype` where the flags do not say it."""
    from distill3d.runs.config import PriorConfig, from_plain

    return from_plain(PriorConfig, {"prior": prior, "dtype": dtype, **nested(model.changes())})


def chosen_prompts(words: Sequence[str], prior: str, full: bool, count: int) -> tuple[str, ...]:
    """The prompts of --prompts, else `count` of the list for this prior, with --full all of it."""
    from distill3d.bench.paper.experiments import spread

    listed = prompts_from(words, prior)
    return listed if words or full else spread(listed, count)


def load_checked(config: PriorConfig, prompts: Sequence[str], force: bool, out: Path | None = None) -> Prior:
    """The prior of a configuration, if it knows the prompts and the folder `out` can be made; else ValueError."""
    from distill3d.priors.loading import load_prior
    from distill3d.runs.objects import check_prompt

    for prompt in prompts:
        check_prompt(prompt, config.prior, force)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error
    return load_prior(config.prior, config.device, config.dtype, config.prior_options)


def note_evaluator(evaluator: Evaluator | None) -> None:
    if evaluator is None:
        text = "no evaluator: scores that need one are left out; pass the folder of a CLIP model with --evaluator"
        print(text, file=sys.stderr)


def conclude(out: Path | str, folder: Path, name: str, table: Table, text: str) -> None:
    """Prints the table and writes it with figure and caption as one Markdown page, to a shared address as well."""
    from distill3d.bench.sweep import upload
    from distill3d.bench.tables import markdown
    from distill3d.files import replacing

    written = markdown(table)
    with replacing(folder / f"{name}.md") as draft:
        draft.write_text(f"![{name}]({name}.png)\n\n{text}\n\n{written}", encoding="utf-8")
    print(markdown(table, transposed=on_terminal()))
    if isinstance(out, str):
        upload(out, folder)
        print(f"all of it: {out}")
