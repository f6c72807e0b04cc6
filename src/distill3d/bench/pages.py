"""What the pages share: HTML files with pictures and models inside that need no other file and no network.

Templates, style and script are in `page/`. Pictures and models are stored as text; models and the program that shows
them (model-viewer, Apache-2.0) are unpacked when they are asked for. A content security policy in the page forbids it
the network.
"""

from __future__ import annotations

import base64
import gzip
from pathlib import Path

import distill3d
from distill3d.files import replacing
from distill3d.untrusted import printable

PAGE = Path(__file__).parent / "page"


def write_page(path: Path, template: str, **values: object) -> None:
    """Writes a page from a template in `page/`; texts among the values are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    viewer = (PAGE / "model-viewer.min.js").read_text(encoding="utf-8").split("//# sourceMappingURL")[0]
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(template).render(
        **values,
        version=distill3d.__version__,
        css=(PAGE / "page.css").read_text(encoding="utf-8"),
        js=(PAGE / "page.js").read_text(encoding="utf-8"),
        viewer=packed(viewer.encode()),
    )
    with replacing(path) as draft:
        draft.write_text(printable(page), encoding="utf-8")


def data_uri(picture: bytes) -> str:
    """A WebP as the source of an image; empty for no bytes."""
    return f"data:image/webp;base64,{base64_text(picture)}" if picture else ""


def packed(content: bytes) -> str:
    """Bytes compressed, as text that the page's script unpacks; empty for no bytes."""
    return base64_text(gzip.compress(content, 9, mtime=0)) if content else ""


def base64_text(content: bytes) -> str:
    """Bytes as text."""
    return base64.b64encode(content).decode()
