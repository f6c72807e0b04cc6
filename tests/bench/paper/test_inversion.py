"""The study of equation 8: exact on the oracle, complete in its files."""

import csv

import pytest
import torch

from distill3d.bench.paper.inversion import (
    STRATEGIES,
    InversionSettings,
    inversion,
    measure_residuals,
    trajectory,
    write_residuals,
)
from distill3d.cli import main as cli

SETTINGS = InversionSettings(prompts=("left", "odd"), seeds=2, scales=(1.0, 3.0), steps=12, times=4)


def test_on_a_ddim_trajectory_its_own_noise_solves_equation_8_and_random_noise_does_not(mixture):
    result = measure_residuals(mixture, SETTINGS)
    assert len(result.residuals) == 2 * 4 * len(STRATEGIES)
    assert {p.strategy for p in result.residuals} == set(STRATEGIES) == {name for _, name in result.images}
    for point in result.residuals:
        if point.strategy == "DDIM's own":
            assert point.residual < 1e-12 and point.nfe == 0  # float32: (1e-7)^2, and some room
        if point.strategy == "random draw" and point.t < 0.9:  # near pure noise every noise is nearly right
            assert point.residual > 0.02 and point.nfe == 0


def test_the_trajectory_is_the_sampler(mixture, conditions):
    """x0 and kappa at one time give the sample of the next: x = alpha' x0 + sigma' kappa."""
    conditioning = conditions(mixture, ["left", "right"])
    times = torch.linspace(0.9, 0.1, 5, dtype=torch.float64)
    seen = trajectory(mixture, conditioning, 2.0, times, torch.Generator().manual_seed(0))
    again = trajectory(mixture, conditioning, 2.0, times, torch.Generator().manual_seed(0))
    assert len(seen) == 5 and torch.equal(seen[3][0], again[3][0])
    for (x0, kappa), (after, eps), t in zip(seen, seen[1:], times[1:], strict=False):
        alpha, sigma = mixture.schedule.alpha(t[None]), mixture.schedule.sigma(t[None])
        torch.testing.assert_close(alpha * x0 + sigma * kappa, alpha * after + sigma * eps, rtol=1e-4, atol=1e-4)


def test_the_price_of_an_inversion_is_what_its_hops_cost(mixture):
    result = measure_residuals(mixture, SETTINGS, {"ten": inversion(10), "free": inversion(10, 0.0)})
    price = {(p.strategy, p.scale, round(p.t, 2)): p.nfe for p in result.residuals}
    assert price["ten", 3.0, 0.98] == 20 and price["ten", 1.0, 0.98] == price["free", 3.0, 0.98] == 10
    assert price["ten", 3.0, 0.02] == 2


def test_residuals_survive_their_file(mixture, tmp_path):
    result = measure_residuals(mixture, SETTINGS, {"random": STRATEGIES["random draw"]})
    write_residuals(tmp_path / "residuals.csv", result.residuals)
    with (tmp_path / "residuals.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["residual"]) for row in rows] == pytest.approx([p.residual for p in result.residuals], rel=1e-4)


@pytest.mark.parametrize(
    "settings", [{"prompts": ()}, {"seeds": 0}, {"scales": (float("nan"),)}, {"steps": 4, "times": 5}]
)
def test_mistakes_are_value_errors(settings):
    with pytest.raises(ValueError):
        InversionSettings(**settings)


def test_the_command_draws_the_figure(kl_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from PIL import Image

    arguments = ["paper", "inversion", "--prior", str(kl_folder), "--prompts", "a red dot", "--seeds", "1"]
    assert cli.run([*arguments, "--steps", "4", "--times", "2", "--out", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"inversion.png", "inversion.csv"}
    with Image.open(tmp_path / "inversion.png") as picture:
        assert picture.size[0] > 1000  # 7 inches in print
    assert str(tmp_path / "inversion.png") in capsys.readouterr().out.replace("\n", "")
