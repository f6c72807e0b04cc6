"""Memory and time of the paper's recipe by prior, planned: the table of docs/priors.md. No model and no GPU is needed.

    python benchmarks/plan_priors.py [--cards H100 RTX3090] [PRIOR ...]

Half precision (bfloat16), 10,000 steps of one view, rendered at 512 px. Memory is that of tensors at the peak of the
loop, without and with `prior_options.checkpointing`, and while texts are encoded; times are without the renderer.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from distill3d.distill.recipes import PAPER
from distill3d.planning.cards import find_card
from distill3d.planning.measure import Known
from distill3d.planning.plan import plan, planned_memory
from distill3d.priors.options import PriorOptions
from distill3d.runs.objects import Config

PRIORS = ("sd15", "sd21", "sdxl", "sd35", "sd35-large", "flux")
RECIPE = replace(PAPER, render_size=512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("priors", nargs="*", metavar="PRIOR", help=f"default: {', '.join(PRIORS)}")
    parser.add_argument("--cards", nargs="+", default=["H100", "RTX3090"])
    arguments = parser.parse_args()
    cards, known = [find_card(name) for name in arguments.cards], Known()
    names = [f"{card.name}, hours" for card in cards]
    print(f"| prior | px | network, GB | loop, GB | checkpointing, GB | texts, GB | rows | {' | '.join(names)} |")
    print("|---" * (7 + len(cards)) + "|")
    for prior in arguments.priors or PRIORS:
        config = Config("a corgi", RECIPE, prior=prior, device=f"cuda:{cards[0].name}", dtype="bfloat16")
        found = plan(config, known)
        less = planned_memory(replace(config, prior_options=PriorOptions(checkpointing=True)), known)
        step, texts = found.memory.step, found.memory.texts
        memory = (step["weights of the network"], *(sum(x.values()) for x in (step, less.step, texts)))
        times = [sum(seconds for part, seconds in found.seconds(card).items() if part != "renderer") for card in cards]
        cells = [f"`{prior}`", str(found.memory.image_size), *(f"{x / 1e9:.1f}" for x in memory)]
        cells += [f"{round(found.rows, -3):,}", *(f"{seconds / 3600:.1f}" for seconds in times)]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
