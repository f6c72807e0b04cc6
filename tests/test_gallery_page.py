"""The gallery of the manual shows what its script made: each command has its turning picture."""

import re

from docs_gallery import FRAMES, PAGE, filled, objects, textured
from PIL import Image

PICTURES = PAGE.parent / "images" / "gallery"
MOST_BYTES, MOST_BYTES_OF_ALL = 60_000, 3_000_000


def test_the_page_shows_every_object_with_its_command():
    items = [*objects(), *textured()]
    assert len(objects()) == 24 and len(textured()) == 6 and len({item.name for item in items}) == 30
    text = PAGE.read_text()
    shown = re.findall(r"!\[([^]]+)\]\(images/gallery/([^)]+)\.webp\)<br>`([^`]+)`", text)
    assert shown == [(item.prompt, item.name, item.command) for item in items]
    assert filled(text, PICTURES) == text  # it is what the script writes
    assert sorted(path.stem for path in PICTURES.iterdir()) == sorted(item.name for item in items)


def test_each_picture_turns_and_is_small():
    sizes = []
    for path in PICTURES.glob("*.webp"):
        sizes.append(path.stat().st_size)
        with Image.open(path) as picture:
            assert picture.size == (128, 128) and picture.n_frames == FRAMES and picture.info["loop"] == 0, path.name
            front = picture.convert("RGB")
            picture.seek(FRAMES // 4)
            assert picture.convert("RGB") != front, path.name
    assert len(sizes) == 30 and max(sizes) <= MOST_BYTES and sum(sizes) <= MOST_BYTES_OF_ALL
