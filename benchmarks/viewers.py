"""Are GLB and splat files what other programs take? The reference validator, trimesh, and two viewers in a browser.

    npm install --prefix /tmp/viewers three gltf-validator @mkkellogg/gaussian-splats-3d   # outside the repository
    pip install playwright                                                                # and a system's Chromium
    python benchmarks/viewers.py A.glb B.ply ... --modules /tmp/viewers/node_modules --picture gallery.png

For each GLB file: errors and warnings of gltf-validator, faces and material as trimesh reads them, and a row of
pictures as three.js shows it from the front, obliquely and from behind, with its own loader, physically based
material, textures with mipmaps, three lights and sRGB output. For each PLY file of splats: how many GaussianSplats3D
read, and what it shows, with the axes that files of this kind usually have (y down). The exit status is 1 if any file
has an error.
"""

from __future__ import annotations

import argparse
import base64
import functools
import http.server
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import trimesh

from distill3d.export.video import contact_sheet, save_image

AZIMUTHS = (0, 60, 180)
VALIDATE = """
const validator = require("gltf-validator"), fs = require("fs");
validator.validateBytes(new Uint8Array(fs.readFileSync(process.argv[1]))).then(
  report => console.log(JSON.stringify(report.issues)));
"""
PAGE = """<!doctype html><html><body style="margin:0"><canvas id="c"></canvas>
<script type="importmap">{"imports": {"three": "/three/build/three.module.js"}}</script>
<script type="module">
import * as THREE from "three";
import { GLTFLoader } from "/three/examples/jsm/loaders/GLTFLoader.js";
const size = SIZE, canvas = document.getElementById("c");
const renderer = new THREE.WebGLRenderer({ canvas, antialias: true, preserveDrawingBuffer: true });
renderer.setSize(size, size);
renderer.outputColorSpace = THREE.SRGBColorSpace;
const scene = new THREE.Scene();
scene.background = new THREE.Color(0xe6e6e6);
scene.add(new THREE.HemisphereLight(0xffffff, 0xb0b0b0, 2.2));
const camera = new THREE.PerspectiveCamera(35, 1, 0.01, 100);
for (const [x, y, z, strength] of [[2, 3, 2, 1.2], [-3, 1, 1, 0.6]]) {
  const light = new THREE.DirectionalLight(0xffffff, strength);
  light.position.set(x, y, z);
  camera.add(light);
}
scene.add(camera);
window.show = async (url, azimuths) => {
  const gltf = await new GLTFLoader().loadAsync(url);
  scene.add(gltf.scene);
  const ball = new THREE.Box3().setFromObject(gltf.scene).getBoundingSphere(new THREE.Sphere());
  const distance = 1.05 * ball.radius / Math.sin(Math.PI * 35 / 360);
  const pictures = azimuths.map(degrees => {
    const a = Math.PI * degrees / 180, up = Math.sin(0.3), out = Math.cos(0.3);
    camera.position.set(out * Math.sin(a), up, out * Math.cos(a)).multiplyScalar(distance).add(ball.center);
    camera.lookAt(ball.center);
    renderer.render(scene, camera);
    return canvas.toDataURL("image/png");
  });
  let texture = 0;
  gltf.scene.traverse(o => { if (o.isMesh && o.material.map) texture = o.material.map.image.width; });
  scene.remove(gltf.scene);
  return { pictures, texture };
};
window.ready = true;
</script></body></html>"""

SPLATS = """<!doctype html><html><body style="margin:0"><div id="c" style="width:SIZEpx;height:SIZEpx"></div>
<script type="importmap">{"imports": {"three": "/three/build/three.module.js"}}</script>
<script type="module">
import { Viewer, SceneFormat } from "/@mkkellogg/gaussian-splats-3d/build/gaussian-splats-3d.module.js";
let viewer;
window.show = async url => {
  document.getElementById("c").replaceChildren();
  viewer = new Viewer({ rootElement: document.getElementById("c"), cameraUp: [0, -1, 0], useBuiltInControls: false,
    sharedMemoryForWorkers: false, gpuAcceleratedSort: false });
  await viewer.addSplatScene(url, { format: SceneFormat.Ply, showLoadingUI: false });
  viewer.start();
  return viewer.splatMesh.getSplatCount();
};
const sorted = async () => { while (viewer.sortRunning) await new Promise(done => setTimeout(done, 50)); };
window.turn = async degrees => {  // y is down, and whoever sees the front stands at -z: see docs/conventions.md
  const a = Math.PI * degrees / 180;
  viewer.camera.position.set(2.6 * Math.sin(a), -0.8, -2.6 * Math.cos(a));
  viewer.camera.lookAt(0, 0, 0);
  viewer.camera.updateMatrixWorld();
  await sorted();  // for where it stood before
  await viewer.runSplatSort(true, true);
  await sorted();
};
window.ready = true;
</script></body></html>"""

PAGES = {"/": PAGE, "/splats": SPLATS}
SETTLED = 1000  # milliseconds in which the splats viewer has drawn what it sorted


def issues(path: Path, modules: Path) -> dict:
    """What gltf-validator says: numErrors, numWarnings, messages."""
    command = ["node", "-e", VALIDATE, str(path.resolve())]
    return json.loads(subprocess.run(command, cwd=modules.parent, capture_output=True, text=True, check=True).stdout)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the page, three.js and the files of the gallery to this machine alone."""

    def __init__(self, *arguments, modules: Path, files: list[Path], size: int, **options):
        self.modules, self.files, self.size = modules, files, size
        super().__init__(*arguments, **options)

    def do_GET(self) -> None:
        kind = "text/javascript"
        if self.path in PAGES:
            content, kind = PAGES[self.path].replace("SIZE", str(self.size)).encode(), "text/html"
        elif self.path.startswith("/file/"):
            content, kind = self.files[int(self.path.rsplit("/", 1)[1])].read_bytes(), "application/octet-stream"
        elif self.path.startswith(("/three/", "/@mkkellogg/")) and (self.modules / self.path[1:]).is_file():
            content = (self.modules / self.path[1:]).read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args) -> None:
        """Says nothing."""


@contextmanager
def served(modules: Path, files: list[Path], size: int) -> Iterator[str]:
    """The address of a server that runs meanwhile."""
    handler = functools.partial(Handler, modules=modules, files=files, size=size)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def pictures(files: list[Path], modules: Path, size: int, chromium: str) -> list[tuple[torch.Tensor, int]]:
    """For each file [len(AZIMUTHS), 3, size, size] in [0, 1] as a viewer shows it, and a number.

    The number is the width of a mesh's texture (0: none), or how many splats were read.
    """
    from playwright.sync_api import sync_playwright

    switches = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    switches += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    found = []
    with served(modules, files, size) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=switches)
        page = browser.new_page(viewport={"width": size, "height": size})
        page.on("pageerror", lambda error: print(f"page: {error}", file=sys.stderr))
        for i, path in enumerate(files):
            splats = path.suffix == ".ply"
            page.goto(address + ("/splats" if splats else "/"))
            page.wait_for_function("window.ready === true", timeout=120_000)
            if splats:
                number, views = page.evaluate("url => window.show(url)", f"/file/{i}"), []
                for azimuth in AZIMUTHS:
                    page.evaluate("degrees => window.turn(degrees)", azimuth)
                    page.wait_for_timeout(SETTLED)
                    views.append(page.screenshot())
            else:
                shown = page.evaluate("([url, turns]) => window.show(url, turns)", [f"/file/{i}", list(AZIMUTHS)])
                views = [base64.b64decode(data.split(",", 1)[1]) for data in shown["pictures"]]
                number = shown["texture"]
            found.append((torch.stack([decoded(view) for view in views]), number))
        browser.close()
    return found


def decoded(png: bytes) -> torch.Tensor:
    """[3, H, W] in [0, 1]."""
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGB"))).permute(2, 0, 1) / 255


def main() -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="GLB files, and PLY files of splats")
    parser.add_argument("--modules", type=Path, required=True, help="node_modules, see above")
    parser.add_argument("--picture", type=Path, required=True, help="contact sheet to write, three views a file")
    parser.add_argument("--size", type=int, default=256, help="pixels a side of each view")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    errors = 0
    shown = pictures(arguments.files, arguments.modules, arguments.size, arguments.chromium)
    for path, (_, number) in zip(arguments.files, shown, strict=True):
        if path.suffix == ".ply":
            print(f"{path}: GaussianSplats3D: {number} splats; {path.stat().st_size / 1e6:.1f} MB")
            continue
        report = issues(path, arguments.modules)
        errors += report["numErrors"]
        mesh = trimesh.load(path, force="mesh")
        print(
            f"{path}: {report['numErrors']} errors, {report['numWarnings']} warnings; "
            f"trimesh: {len(mesh.faces)} faces, {type(mesh.visual).__name__}; "
            f"three.js: texture {number or 'none'}; {path.stat().st_size / 1e6:.1f} MB"
        )
        for message in report["messages"]:
            if message["severity"] < 2:
                print(f"  {message['code']}: {message['message']} {message.get('pointer', '')}")
    save_image(arguments.picture, contact_sheet(torch.cat([views for views, _ in shown]), columns=6))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
