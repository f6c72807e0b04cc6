"""Are GLB files what other programs take? The reference validator, trimesh, and three.js in a browser.

    npm install --prefix /tmp/gallery three gltf-validator      # once, outside the repository
    pip install playwright                                      # and a Chromium of the system
    python benchmarks/gallery.py A.glb B.glb ... --modules /tmp/gallery/node_modules --picture gallery.png

For each file: errors and warnings of gltf-validator, faces and material as trimesh reads them, and a row of
pictures as three.js shows it from the front, obliquely and from behind, with its own loader, physically based
material, textures with mipmaps, three lights and sRGB output. The exit status is 1 if any file has an error.
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

from distill3d.video import contact_sheet, save_image

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
        if self.path == "/":
            content, kind = PAGE.replace("SIZE", str(self.size)).encode(), "text/html"
        elif self.path.startswith("/file/"):
            content, kind = self.files[int(self.path.rsplit("/", 1)[1])].read_bytes(), "model/gltf-binary"
        elif self.path.startswith("/three/") and (self.modules / self.path[1:]).is_file():
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
    """For each file [len(AZIMUTHS), 3, size, size] in [0, 1] from three.js, and the width of its texture (0: none)."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    switches = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    switches += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    found = []
    with served(modules, files, size) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=switches)
        page = browser.new_page()
        page.on("pageerror", lambda error: print(f"page: {error}", file=sys.stderr))
        page.goto(address)
        page.wait_for_function("window.ready === true", timeout=120_000)
        for i in range(len(files)):
            shown = page.evaluate("([url, turns]) => window.show(url, turns)", [f"/file/{i}", list(AZIMUTHS)])
            views = []
            for data in shown["pictures"]:
                picture = Image.open(io.BytesIO(base64.b64decode(data.split(",", 1)[1]))).convert("RGB")
                views.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
            found.append((torch.stack(views), shown["texture"]))
        browser.close()
    return found


def main() -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="GLB files")
    parser.add_argument("--modules", type=Path, required=True, help="node_modules with three and gltf-validator")
    parser.add_argument("--picture", type=Path, required=True, help="contact sheet to write, three views a file")
    parser.add_argument("--size", type=int, default=256, help="pixels a side of each view")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    errors = 0
    shown = pictures(arguments.files, arguments.modules, arguments.size, arguments.chromium)
    for path, (_, texture) in zip(arguments.files, shown, strict=True):
        report = issues(path, arguments.modules)
        errors += report["numErrors"]
        mesh = trimesh.load(path, force="mesh")
        print(
            f"{path}: {report['numErrors']} errors, {report['numWarnings']} warnings; "
            f"trimesh: {len(mesh.faces)} faces, {type(mesh.visual).__name__}; "
            f"three.js: texture {texture or 'none'}; {path.stat().st_size / 1e6:.1f} MB"
        )
        for message in report["messages"]:
            if message["severity"] < 2:
                print(f"  {message['code']}: {message['message']} {message.get('pointer', '')}")
    save_image(arguments.picture, contact_sheet(torch.cat([views for views, _ in shown]), columns=6))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
