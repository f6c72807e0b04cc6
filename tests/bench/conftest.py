"""What the tests of pages share: a ball to show, and headless Chromium without a network."""

import os
import shutil

import pytest
import torch

from distill3d.scenes.voxels import VoxelOptions

FLAGS = [
    "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
]  # fmt: skip
# Without a GPU pixels are read back slowly, a busy machine is late with a frame: both are said, neither is a mistake.
SLOW = ("GPU stall due to ReadPixels", "rAF timed out")


@pytest.fixture(scope="session")
def ball():
    """A field that is a solid colored ball of the radius 0.6."""
    field = VoxelOptions(resolution=24, blob_height=0.0).build()
    axis = torch.linspace(-1, 1, 24)
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    with torch.no_grad():
        field.raw[..., 0] = 0.54 + 40 * (0.6 - (x**2 + y**2 + z**2).sqrt())  # softplus(0.54) is 1
        field.raw[..., 1:] = torch.stack((x, y, z), -1) * 4
    return field.eval()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; the tests are skipped where there is none."""
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("DISTILL3D_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or set DISTILL3D_CHROMIUM")
    with sync.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """Opens a page; whatever the console says or the network is asked for, fails the test."""
    complaints, pages = [], []

    def open_page(path):
        page = browser.new_page(
            viewport={"width": 1100, "height": 800}, color_scheme="light", reduced_motion="no-preference"
        )
        pages.append(page)
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on(
            "request", lambda asked: asked.url.startswith(("file:", "data:", "blob:")) or complaints.append(asked.url)
        )
        page.goto(path.as_uri())
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not [c for c in complaints if not any(said in c for said in SLOW)]
