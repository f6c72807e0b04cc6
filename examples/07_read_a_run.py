"""Read a finished run: its configuration, its metrics, its scene.

python examples/07_read_a_run.py runs/a-red-mushroom-1a2b3c
"""

import sys
from pathlib import Path

import distill3d as d3d
from distill3d.cameras import turntable
from distill3d.runs.folder import RunFolder
from distill3d.runs.objects import read_config


def main(run: str) -> dict[str, float]:
    """Prints what a run did; returns a summary."""
    config, steps = read_config(Path(run)), RunFolder(Path(run)).history()
    print(f"{config.prompt!r}, seed {config.seed}, prior {config.prior}, {len(steps)} steps")
    for line in steps[:: max(len(steps) // 5, 1)]:
        print(f"step {line['step']:>4}  t {line['t']:.2f}  loss {line['loss']:.3f}  NFE {line['nfe']}")
    front = turntable(1, elevation=15, distance=2.8, fov=40)
    rendering = d3d.load_scene(run).render(front, 64, d3d.scenes.ConstantBackground(0.9)(front, 64))
    return {"nfe": steps[-1]["nfe"], "seconds": steps[-1]["seconds"], "opacity": rendering.opacity.mean().item()}


if __name__ == "__main__":
    print(main(sys.argv[1]))
