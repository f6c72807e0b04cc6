"""Splats as a scene: how they start, grow, vanish, are saved and go on."""

import pytest
import torch

from distill3d.cameras import orbit, turntable
from distill3d.meshes.mesh import Mesh
from distill3d.render.splat import Splats
from distill3d.scenes.gaussians import (
    NAMES,
    RESET,
    Densification,
    GaussianOptions,
    Gaussians,
    rotation_from_z,
    splats_in_ball,
    splats_on_mesh,
    split_opacity,
)
from distill3d.types import Lighting

TETRAHEDRON = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
FACES = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
GROW = Densification(start=0.0, stop=1.0, every=2, fraction=0.5, split_size=0.05)


def colored(vertices, faces, colors):
    """A mesh with a color for each vertex."""
    return Mesh(vertices.double().numpy(), faces.numpy(), colors.double().numpy())


def grown(count=40, plan=GROW, seed=1):
    return Gaussians(GaussianOptions(count=count, densification=plan, seed=seed))


def adam(scene, rate=0.01):
    groups = [g | {"lr": rate * g["scale"]} for g in scene.parameter_groups()]
    return torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15)


def train(scene, optimizer, steps, total=100):
    """Towards a red disc in front of black."""
    cameras, axis = turntable(3, 20, 2.8, 40), torch.arange(12) - 5.5
    disc = (axis.square() + axis[:, None].square() < 16) * torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    for step in steps:
        scene.adapt(step, total, optimizer)
        out = scene.render(cameras, 12, torch.zeros(3, 3))
        optimizer.zero_grad()
        (out.rgb - disc).square().mean().backward()
        optimizer.step()


def test_a_ball_is_dense_in_the_middle():
    splats = splats_in_ball(4000, 0.5, 0.1, torch.Generator().manual_seed(0))
    radius = splats.means.norm(dim=1)
    assert radius.max() < 0.5
    # For density ~ r^2 (1 - r / R) the mean is 3/5 R and the share within R / 2 is 4 u^3 - 3 u^4 = 5 / 16.
    torch.testing.assert_close(radius.mean(), torch.tensor(0.3), atol=0.006, rtol=0)
    torch.testing.assert_close((radius < 0.25).float().mean(), torch.tensor(5 / 16), atol=0.03, rtol=0)
    torch.testing.assert_close(splats.means.mean(0), torch.zeros(3), atol=0.015, rtol=0)
    torch.testing.assert_close(torch.sigmoid(splats.opacities), torch.full((4000,), 0.1))


def test_a_mesh_is_covered_evenly_in_its_colors():
    paint = torch.eye(4)[:, :3]  # so that a color tells the place: all but the last vertex's weight
    splats = splats_on_mesh(colored(TETRAHEDRON, FACES, paint), 4000, torch.Generator().manual_seed(0))
    face = torch.stack([splats.means[:, 2], splats.means[:, 1], splats.means[:, 0], 1 - splats.means.sum(1)]).abs()
    distance, nearest = face.min(0)
    assert distance.max() < 1e-6
    areas = torch.tensor([0.5, 0.5, 0.5, 0.75**0.5])
    counts = torch.bincount(nearest, minlength=4)[:4]
    torch.testing.assert_close(counts / 4000, areas[: len(counts)] / areas.sum(), atol=0.002, rtol=0)
    weights = torch.cat((splats.colors, 1 - splats.colors.sum(1, keepdim=True)), 1)
    torch.testing.assert_close(weights @ TETRAHEDRON, splats.means)
    outward = torch.tensor([[0.0, 0, -1], [0, -1, 0], [-1, 0, 0], [3**-0.5] * 3])
    torch.testing.assert_close(splats.axes()[:, :, 2], outward[nearest], atol=1e-5, rtol=0)
    assert bool((splats.log_scales.argmin(1) == 2).all())


def test_a_mesh_of_splats_looks_like_the_mesh():
    ball = pytest.importorskip("trimesh").creation.icosphere(subdivisions=3, radius=0.6)
    vertices, faces = torch.from_numpy(ball.vertices.copy()), torch.from_numpy(ball.faces.copy())
    scene = Gaussians(
        splats=splats_on_mesh(colored(vertices, faces, vertices / 1.2 + 0.5), 3000, torch.Generator().manual_seed(0))
    )
    out = scene.render(turntable(1, 0, 2.8, 40), 33, torch.ones(1, 3), normals=True)
    assert out.opacity[0, 0, 16, 16] > 0.99 and out.opacity[0, 0, 0, 0] < 0.01
    torch.testing.assert_close(out.depth[0, 0, 16, 16], torch.tensor(2.2), atol=0.02, rtol=0)
    torch.testing.assert_close(out.rgb[0, :, 16, 16], torch.tensor([1.0, 0.5, 0.5]), atol=0.05, rtol=0)
    torch.testing.assert_close(out.normal[0, :, 16, 16], torch.tensor([1.0, 0, 0]), atol=0.1, rtol=0)


def test_the_z_axis_turns_anywhere():
    directions = torch.nn.functional.normalize(torch.tensor([[1.0, 2, 3], [0, 0, 1], [0, 0, -1], [-1, 0, -1]]), dim=1)
    zero = torch.zeros(4, 3)
    axes = Splats(zero, rotation_from_z(directions), zero, zero[:, 0], zero).axes()
    torch.testing.assert_close(axes[:, :, 2], directions)


def test_two_of_half_hide_as_one():
    raw = torch.linspace(-6, 6, 13, dtype=torch.float64)
    torch.testing.assert_close((1 - split_opacity(raw).sigmoid()).square(), 1 - raw.sigmoid())


def test_the_pulled_ones_are_cloned_or_split_and_the_useless_removed():
    scene = grown(8)
    optimizer = adam(scene)
    train(scene, optimizer, range(1))
    with torch.no_grad():
        scene.log_scales.fill_(-4.0)  # small
        scene.log_scales[1, 0] = -2.0  # large
        scene.log_scales[2] = 0.0  # huge
        scene.opacities.fill_(2.0)
        scene.opacities[3] = -9.0  # nearly transparent
        scene.gradient_count.fill_(2.0)
        scene.gradient_sum.copy_(torch.tensor([5.0, 6, 9, 9, 1, 1, 1, 0]))  # 50 % of six
        scene.gradient_count[4] = 1.0
    before = {name: getattr(scene, name).detach().clone() for name in NAMES}
    moments = optimizer.state[scene.means]["exp_avg"].clone()
    scene.adapt(2, 100, optimizer)

    rows = torch.tensor([0, 4, 5, 6, 7])  # kept; then clones of 0 and 4, then two halves of 1
    assert len(scene) == 9
    assert torch.equal(scene.means[:7], before["means"][torch.tensor([0, 4, 5, 6, 7, 0, 4])])
    cloned = torch.tensor([0, 1, 5, 6])
    assert torch.equal(scene.opacities[cloned], split_opacity(torch.full((4,), 2.0)))
    torch.testing.assert_close(scene.log_scales[7:].exp(), before["log_scales"][[1, 1]].exp() / 1.6)
    assert not torch.equal(scene.means[7], scene.means[8])
    distance = (scene.means[7:] - before["means"][1]).norm(dim=1)
    assert bool((distance > 0).all()) and bool((distance < 5 * torch.tensor(-2.0).exp()).all())
    state = optimizer.state[scene.means]
    assert torch.equal(state["exp_avg"][:5], moments[rows]) and bool((state["exp_avg"][5:] == 0).all())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in scene.parameters()}
    assert scene.gradient_sum.shape == (9,) and scene.gradient_sum.sum() == scene.gradient_count.sum() == 0


def test_halves_lie_as_their_parent_does():
    scene = Gaussians(GaussianOptions(count=1))
    with torch.no_grad():
        scene.log_scales.copy_(torch.tensor([[-1.0, -2.0, -3.0]]))
    parents = {name: value.repeat(4000, *[1] * (value.ndim - 1)) for name, value in scene.named_parameters()}
    means = scene._halves(parents)["means"] - scene.means.detach()
    axes = scene.splats().axes()[0].detach()
    expected = axes @ torch.diag((2 * scene.log_scales[0]).exp()) @ axes.T
    torch.testing.assert_close(torch.cov(means.T), expected.detach(), atol=0.01, rtol=0.05)


def test_there_are_never_more_than_allowed_nor_none():
    scene = grown(10, Densification(start=0.0, stop=1.0, every=1, fraction=1.0, max_splats=15))
    optimizer = adam(scene)
    train(scene, optimizer, range(6))
    assert len(scene) == 15
    with torch.no_grad():
        scene.opacities.fill_(-9.0)
        scene.gradient_sum.zero_()
    scene.adapt(7, 100, optimizer)
    assert len(scene) == 1


def test_a_reset_makes_them_prove_themselves_anew():
    scene = Gaussians(GaussianOptions(count=5, densification=Densification(stop=0.0, reset=(0.5,))))
    optimizer = adam(scene)
    train(scene, optimizer, range(2))
    with torch.no_grad():
        scene.opacities[0] = -8.0
    scene.adapt(50, 100, optimizer)
    torch.testing.assert_close(scene.opacities.detach(), torch.tensor([-8.0] + [RESET] * 4))
    assert not optimizer.state.get(scene.opacities)


def test_what_is_resumed_goes_on_as_if_it_had_not_stopped():
    whole, parts = grown(), grown()
    train(whole, adam(whole), range(9))
    first = adam(parts)
    train(parts, first, range(5))
    saved = {name: value.clone() for name, value in parts.state_dict().items()}
    moments = first.state_dict()["state"]

    other = grown(7, seed=5)
    other.load_state_dict(saved)
    second = adam(other)
    second.load_state_dict(second.state_dict() | {"state": moments})
    other.adapt(4, 100, second)  # the last step once more: nothing happens
    assert len(other) == len(parts) > 40
    train(other, second, range(5, 9))
    assert len(other) == len(whole) > len(parts)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_splats_are_lit_from_where_the_light_is():
    """A ball of splats under a light far above: Lambert's law at its top and at its side."""
    ball = pytest.importorskip("trimesh").creation.icosphere(subdivisions=3, radius=0.6)
    vertices, faces = torch.from_numpy(ball.vertices.copy()), torch.from_numpy(ball.faces.copy())
    gray = torch.full((len(vertices), 3), 0.5)
    scene = Gaussians(splats=splats_on_mesh(colored(vertices, faces, gray), 3000, torch.Generator().manual_seed(0)))
    cameras, black = orbit([0.0, 0.0], [89.9, 0.0], 2.8, 40.0), torch.zeros(2, 3)
    for mode, paint in (("lambertian", 0.5), ("textureless", 1.0)):
        light = Lighting(mode, torch.tensor([[0.0, 0.0, 1e4]] * 2), ambient=0.2, diffuse=0.8)
        middle = scene.render(cameras, 33, black, lighting=light).rgb[:, 0, 16, 16]
        torch.testing.assert_close(middle[0], torch.tensor(paint), atol=0.02, rtol=0)
        assert 0.2 * paint - 0.01 < middle[1] < 0.35 * paint


def test_evaluation_leaves_the_state_alone():
    scene = grown().eval()
    before = {name: value.clone() for name, value in scene.state_dict().items()}
    scene.render(turntable(1, 20, 2.8, 40), 12, torch.zeros(1, 3)).rgb.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in scene.state_dict().items())


def test_training_paints_them():
    scene = grown(60, Densification(every=10, min_opacity=0.001))
    train(scene, adam(scene, 0.05), range(60), total=60)
    assert len(scene) > 60
    rgb = scene.eval().render(turntable(3, 20, 2.8, 40), 12, torch.zeros(3, 3)).rgb[:, :, 6, 6]
    assert rgb[:, 0].min() > 0.8 and rgb[:, 1:].max() < 0.2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GaussianOptions(count=0), "count"),
        (lambda: GaussianOptions(opacity=1.0), "opacity"),
        (lambda: Densification(every=0), "every"),
        (lambda: splats_on_mesh(colored(TETRAHEDRON, 0 * FACES, TETRAHEDRON), 9, torch.Generator()), "no area"),
        (lambda: splats_on_mesh(colored(TETRAHEDRON / 0, FACES, TETRAHEDRON), 9, torch.Generator()), "NaN"),
    ],
)
def test_mistakes_are_value_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
