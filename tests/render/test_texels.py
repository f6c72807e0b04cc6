"""Places of noise that views show: white noise in each view, the same noise at the same place of the object.

The object is a ball, whose depth is known in closed form, and the overlap of pixels of two views is counted on random
points of its surface. Channels of the noise are independent draws: many of them measure its moments.
"""

from dataclasses import replace

import pytest
import torch

from distill3d.cameras import orbit, project, rays
from distill3d.objectives import cfd
from distill3d.objectives.objective import Query
from distill3d.render.texels import AZIMUTHS, of_azimuth, of_depth, of_view
from distill3d.scenes.mesh import MeshScene
from distill3d.texels import Texels
from distill3d.types import Rendering

RADIUS, SIDE, DRAWS = 0.7, 16, 1500
VIEWS = orbit([10.0, 35.0, 190.0], [15.0, -5.0, 15.0], 2.8, 40.0)


def ball(cameras, size=64):
    """The rendering of a ball about the origin."""
    ray = rays(cameras, size, size)
    half = (ray.origins * ray.directions).sum(-1)
    root = half**2 - (ray.origins**2).sum(-1) + RADIUS**2
    depth = torch.where(root > 0, -half - root.clamp_min(0).sqrt(), 0.0)[:, None]
    return Rendering(depth.expand(-1, 3, -1, -1), (depth > 0).float(), depth, torch.zeros_like(depth))


def ball_mesh():
    trimesh = pytest.importorskip("trimesh")
    from distill3d.meshes.mesh import Mesh
    from distill3d.scenes.mesh import MeshOptions

    solid = trimesh.creation.icosphere(4, radius=RADIUS)
    return MeshScene(Mesh(solid.vertices.copy(), solid.faces.copy()), MeshOptions(levels=(8,), refit=False))


SURFACES = {
    "depth": lambda cameras: of_depth(ball(cameras), cameras, SIDE, SIDE),
    "mesh": lambda cameras: ball_mesh().noise_texels(cameras, SIDE, SIDE),
}
FRAMES = SURFACES | {
    "view": lambda cameras: of_view(cameras, SIDE, SIDE),
    "azimuth": lambda cameras: of_azimuth(cameras, SIDE, SIDE),
}


def query(texels, mixture, conditions, views, seed, draws):
    used, texel = texels.texel.unique(return_inverse=True)  # an atlas of what is shown, to draw less
    texels = Texels(len(used), texel, texels.pixel)
    x = torch.zeros(views, draws, SIDE, SIDE)
    generator = torch.Generator().manual_seed(seed)
    return Query(
        x, torch.full((views,), 0.5), mixture, conditions(mixture, ["left"] * views), generator, 0, 9, texels=texels
    )


@pytest.fixture(params=FRAMES)
def frame(request):
    return request.param


@pytest.fixture
def kappa(mixture, conditions):
    """Noise [views, draws, side, side] of the views in a frame."""

    def build(frame, cameras=VIEWS, seed=0, draws=DRAWS):
        asked = query(FRAMES[frame](cameras), mixture, conditions, len(cameras), seed, draws)
        return cfd(noise="surface").noise(asked)[0]

    return build


def shown(texels):
    """Texels of each pixel [views, side, side]."""
    return torch.bincount(texels.pixel, minlength=len(VIEWS) * SIDE**2).view(-1, SIDE, SIDE)


def test_the_noise_of_each_view_is_white_and_of_unit_variance(frame, kappa):
    """All moments of second order: the covariance of the pixels of a view is the identity, over many draws."""
    noise = kappa(frame, seed=3).flatten(2)
    deviation = DRAWS**-0.5
    assert noise.mean(1).abs().max() < 4.5 * deviation
    for view in noise:
        covariance = view.T @ view / DRAWS
        assert (covariance.diag() - 1).abs().max() < 4.5 * 2**0.5 * deviation
        assert (covariance - torch.diag(covariance.diag())).abs().max() < 6 * deviation
    kurtosis = (noise**4).mean(1)
    assert (kurtosis - 3).abs().max() < 6 * 96**0.5 * deviation


def test_a_view_shows_a_texel_once(frame):
    texels = FRAMES[frame](VIEWS)
    key = torch.div(texels.pixel, SIDE**2, rounding_mode="floor") * texels.count + texels.texel
    assert len(key.unique()) == len(key) and 0 <= int(texels.texel.min()) <= int(texels.texel.max()) < texels.count


@pytest.mark.parametrize("surface", SURFACES)
def test_a_place_of_the_surface_carries_its_noise_from_view_to_view(surface, kappa):
    """The correlation of two pixels is the area that both see over the geometric mean of what each sees."""
    points = torch.nn.functional.normalize(torch.randn(400_000, 3, generator=torch.Generator().manual_seed(1)), dim=1)
    place, _ = project(VIEWS, RADIUS * points, SIDE, SIDE)
    eye = VIEWS.camera_to_world[:, :3, 3]
    visible = eye @ points.T > RADIUS
    pixel = (place[..., 1].long() * SIDE + place[..., 0].long()).clamp(0, SIDE**2 - 1)
    seen = torch.zeros(3, SIDE**2).scatter_add_(1, pixel, visible.float())
    both = visible[0] & visible[1]
    overlap = torch.zeros(SIDE**4).scatter_add_(0, pixel[0] * SIDE**2 + pixel[1], both.float()).view(SIDE**2, -1)
    expected = overlap / (seen[0, :, None] * seen[1]).sqrt().clamp_min(1)
    # Pixels inside the outline, where corners are means over what is seen all around.
    count = shown(SURFACES[surface](VIEWS))
    inner = torch.nn.functional.avg_pool2d((count > 0).float()[:, None], 3, 1, 1).flatten(1) > 0.99
    noise = kappa(surface).flatten(2)
    measured = noise[0].T @ noise[1] / DRAWS
    used = inner[0, :, None] & inner[1]
    assert int((used & (expected > 0.3)).sum()) > 40
    error = (measured - expected)[used]
    assert error.square().mean().sqrt() < 1.2 * DRAWS**-0.5  # little but the noise of the measurement
    assert error[expected[used] > 0.1].square().mean().sqrt() < 0.1
    slope = float((measured * expected)[used].sum() / expected[used].square().sum())
    assert slope == pytest.approx(1, abs=0.1), slope
    # The other side of the ball shares nothing but the background.
    surface_noise = [view[:, count[i].flatten() > 0] for i, view in enumerate(noise)]
    assert (surface_noise[0].T @ surface_noise[2] / DRAWS).abs().max() < 6 * DRAWS**-0.5


@pytest.mark.parametrize("surface", SURFACES)
def test_where_nothing_is_seen_the_noise_is_the_pixels_own(surface, kappa):
    count, noise = shown(SURFACES[surface](VIEWS)), kappa(surface, draws=3)
    assert torch.equal(noise[0, :, 0], noise[1, :, 0])  # the first row is above the ball
    assert (count[0, 6:10, 6:10] > 9).all()  # and in the middle it is seen


def test_noise_of_an_azimuth_returns_with_it(kappa):
    step = 360 / AZIMUTHS
    noise = kappa("azimuth", orbit([0.0, 0.4 * step, 360.0 - 0.4 * step, step, -170.0, 190.0], 15.0, 2.8, 40.0))
    assert torch.equal(noise[0], noise[1]) and torch.equal(noise[0], noise[2]) and torch.equal(noise[4], noise[5])
    for other in (noise[3], noise[4]):
        assert (noise[0] * other).mean(0).abs().max() < 5 * DRAWS**-0.5
    assert torch.equal(*kappa("view", VIEWS[:2]))


def test_a_seed_gives_one_noise(frame, kappa):
    first, again, other = kappa(frame, seed=5, draws=4), kappa(frame, seed=5, draws=4), kappa(frame, seed=6, draws=4)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_views_of_a_batch_are_as_alone(frame):
    together = FRAMES[frame](VIEWS)
    for i in range(len(VIEWS)):
        pairs = {
            (texels.pixel * texels.count + texels.texel).sort().values
            for texels in (together.of_view(i, SIDE**2), FRAMES[frame](VIEWS[i : i + 1]))
        }
        assert torch.equal(*pairs)


def test_depth_of_any_resolution_shows_the_same_places():
    """Corners are means over a window of one latent pixel: nearly those of a finer rendering."""
    coarse = shown(of_depth(ball(VIEWS, SIDE), VIEWS, SIDE, SIDE))
    fine = shown(of_depth(ball(VIEWS, 8 * SIDE), VIEWS, SIDE, SIDE))
    inner = slice(5, 11)
    torch.testing.assert_close(coarse[:, inner, inner].float(), fine[:, inner, inner].float(), rtol=0.35, atol=6)


def test_noise_on_a_mesh_moves_with_it(kappa):
    scene = ball_mesh()
    before = scene.noise_texels(VIEWS, SIDE, SIDE)
    turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    scene.rest = scene.rest @ turn.T
    after = scene.noise_texels(orbit(VIEWS.azimuth + 90, VIEWS.elevation, 2.8, 40.0), SIDE, SIDE)
    pairs = [set(zip(t.texel.tolist(), t.pixel.tolist(), strict=True)) for t in (before, after)]
    assert len(pairs[0] & pairs[1]) > 0.995 * len(pairs[0])  # up to rounding at the edges of pixels


def test_a_mesh_shows_what_is_in_front_only():
    scene = ball_mesh()
    face, weights = (torch.from_numpy(v) for v in scene.source.sample(64 * SIDE**2))
    points = (scene.rest[scene.faces[face]] * weights[..., None].float()).sum(1)
    texels = scene.noise_texels(VIEWS, SIDE, SIDE)
    facing = VIEWS.camera_to_world[:, :3, 3] @ points.T / RADIUS - RADIUS  # above 0: in front of the horizon
    view = torch.div(texels.pixel, SIDE**2, rounding_mode="floor")
    found = torch.zeros_like(facing, dtype=torch.bool).index_put_((view, texels.texel), torch.tensor(True))
    assert facing[found].min() > -0.15 and found[facing > 0.7].all()  # a fine pixel at the outline is as wide
    assert texels.count == 64 * SIDE**2


def test_a_pixel_beside_the_object_shows_nothing():
    """Only a block of 2 x 2 latent pixels is left of the ball: its neighbors share an edge with it, and no triangle."""
    whole, kept = ball(VIEWS), torch.zeros(len(VIEWS), 1, 64, 64)
    kept[:, :, 28:36, 28:36] = 1
    part = replace(whole, opacity=whole.opacity * kept, depth=whole.depth * kept)
    block = torch.zeros(len(VIEWS), SIDE, SIDE, dtype=torch.bool)
    block[:, 7:9, 7:9] = True
    torch.testing.assert_close(shown(of_depth(part, VIEWS, SIDE, SIDE)) > 0, block)
