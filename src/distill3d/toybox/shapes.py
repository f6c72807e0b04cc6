"""The 24 kinds of toys: real geometry, the front towards +x, z up, sizes drawn anew for each toy.

A kind is a function (toy, u): it adds colored solids to `toy`, and `u(low, high)` draws a size. The colors
MAIN and ACCENT are what the prompt names ("a MAIN car with ACCENT wheels"); everything else is fixed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from distill3d.toybox.solids import Solid, ball, box, capsule, curve, heart, lathe, plate, ring, rod, star

Color = tuple[float, float, float]
Draw = Callable[[float, float], float]

COLORS: dict[str, Color] = {
    "red": (0.86, 0.13, 0.14),
    "orange": (0.98, 0.52, 0.08),
    "yellow": (0.99, 0.84, 0.16),
    "green": (0.18, 0.62, 0.27),
    "blue": (0.14, 0.38, 0.86),
    "purple": (0.50, 0.22, 0.72),
    "pink": (0.98, 0.56, 0.72),
    "brown": (0.46, 0.27, 0.14),
    "white": (0.97, 0.96, 0.94),
    "black": (0.13, 0.13, 0.15),
}
MAIN: Color = (-1.0, 0.0, 0.0)
ACCENT: Color = (-2.0, 0.0, 0.0)
WHITE, DARK, WOOD = COLORS["white"], (0.10, 0.10, 0.12), (0.78, 0.58, 0.38)
CREAM, METAL, GLASS = (0.98, 0.90, 0.76), (0.72, 0.75, 0.79), (0.66, 0.87, 0.97)
LEAF, LIGHT, CARROT = (0.36, 0.70, 0.28), (1.0, 0.93, 0.55), (0.97, 0.50, 0.12)


class Toy:
    """Colored solids under construction."""

    def __init__(self) -> None:
        self.parts: list[tuple[Solid, Color]] = []

    def add(self, color: Color, *solids: Solid) -> None:
        """Adds solids of one color."""
        self.parts.extend((s, color) for s in solids)

    def eyes(self, x: float, z: float, apart: float, size: float) -> None:
        """Two eyes looking along +x, centered at (x, +-apart, z): white with a dark pupil."""
        for y in (-apart, apart):
            self.add(WHITE, ball(0.6 * size, size, size).at(x, y, z))
            self.add(DARK, ball(0.5 * size, 0.62 * size, 0.62 * size).at(x + 0.3 * size, 0.94 * y, z))


def _mushroom(toy: Toy, u: Draw) -> None:
    stem, cap, low = u(0.30, 0.38), u(0.80, 0.95), u(0.55, 0.70)
    toy.add(CREAM, lathe(curve([(stem + 0.08, 0), (stem, 0.25), (stem - 0.03, low), (stem - 0.05, low + 0.2)])))
    dome = u(0.50, 0.65)
    toy.add(
        MAIN, lathe([(cap - 0.12, low), *curve([(cap, low + 0.04), (0.82 * cap, low + 0.6 * dome), (0, low + dome)])])
    )
    for i, (angle, height) in enumerate([(0, 0.45), (72, 0.35), (144, 0.42), (216, 0.4), (288, 0.36), (30, 0.9)]):
        a, r = np.radians(angle + 20 * (i == 5)), cap * np.sqrt(max(1 - (0.9 * height) ** 2, 0)) * 0.95
        toy.add(ACCENT, ball(0.16, 0.16, 0.10).at(r * np.cos(a), r * np.sin(a), low + dome * height))
    toy.eyes(stem - 0.02, 0.62 * low, 0.15, 0.12)


def _pine_tree(toy: Toy, u: Draw) -> None:
    wide, tall = u(0.65, 0.8), u(0.55, 0.65)
    toy.add(WOOD, rod((0, 0, 0), (0, 0, 0.4), 0.17))
    for i, scale in enumerate((1.0, 0.78, 0.55)):
        z = 0.3 + i * 0.62 * tall
        toy.add(
            MAIN, lathe([(wide * scale - 0.06, z - 0.02), (wide * scale, z + 0.04), (0.04, z + tall), (0, z + tall)])
        )
        for y in (-0.5, 0.0, 0.5):
            angle = y if i < 2 else 0.7 * y
            r = wide * scale * 0.93
            toy.add(ACCENT, ball(0.09).at(r * np.cos(angle), r * np.sin(angle), z + 0.1))
    toy.add(LIGHT, plate(star(0.24), 0.1).at(0, 0, 0.42 + 2 * 0.62 * tall + tall - 0.05))


def _car(toy: Toy, u: Draw) -> None:
    long, wide, tall = u(1.7, 2.0), u(0.85, 0.95), u(0.34, 0.42)
    wheel = u(0.22, 0.27)
    toy.add(MAIN, box(long, wide, tall, 0.14).at(0, 0, wheel + 0.5 * tall))
    cabin = u(0.85, 1.05)
    z = wheel + tall + 0.14
    toy.add(GLASS, box(cabin, 0.86 * wide, 0.36, 0.12).at(-0.12, 0, z))
    toy.add(MAIN, box(0.82 * cabin, 0.8 * wide, 0.12, 0.05).at(-0.12, 0, z + 0.2))
    for x in (-0.31 * long, 0.31 * long):
        for y in (-wide / 2, wide / 2):
            toy.add(ACCENT, rod((x, 0.86 * y, wheel), (x, 1.12 * y, wheel), wheel))
            toy.add(METAL, rod((x, 1.0 * y, wheel), (x, 1.15 * y, wheel), 0.4 * wheel))
    for y in (-0.3 * wide, 0.3 * wide):
        toy.add(LIGHT, ball(0.07, 0.12, 0.10).at(long / 2 - 0.01, y, wheel + 0.6 * tall))
    toy.add(DARK, box(0.06, 0.5 * wide, 0.08, 0.02).at(long / 2, 0, wheel + 0.25 * tall))


def _house(toy: Toy, u: Draw) -> None:
    deep, wide, tall = u(0.9, 1.05), u(1.05, 1.25), u(0.62, 0.75)
    toy.add(MAIN, box(deep, wide, tall, 0.04).at(0, 0, tall / 2))
    half, rise = wide / 2 + 0.12, u(0.45, 0.6)
    toy.add(ACCENT, plate([(-half, -0.04), (half, -0.04), (0, rise)], deep + 0.22).at(0, 0, tall + 0.04))
    toy.add(METAL, box(0.17, 0.17, 0.45, 0.02).at(-0.2, 0.28 * wide, tall + 0.4 * rise + 0.15))
    toy.add(WOOD, box(0.06, 0.26, 0.42, 0.02).at(deep / 2, 0, 0.21))
    for y in (-0.33 * wide, 0.33 * wide):
        toy.add(GLASS, box(0.06, 0.2, 0.2, 0.02).at(deep / 2, y, 0.55 * tall))
        toy.add(GLASS, box(0.24, 0.06, 0.2, 0.02).at(0, np.sign(y) * wide / 2, 0.55 * tall))
    toy.add(LIGHT, ball(0.06, 0.11, 0.11).at(deep / 2 + 0.1, 0, tall + 0.38 * rise))


def _rocket(toy: Toy, u: Draw) -> None:
    fat, tall = u(0.36, 0.44), u(1.5, 1.7)
    profile = curve([(0.55 * fat, 0), (fat, 0.3 * tall), (0.92 * fat, 0.6 * tall), (0.62 * fat, 0.8 * tall)])
    toy.add(MAIN, lathe(profile))
    toy.add(ACCENT, lathe(curve([(0.62 * fat, 0.8 * tall), (0.35 * fat, 0.92 * tall), (0, tall)])))
    for angle in (60, 180, 300):
        fin = plate([(0, 0.45), (0.5, 0.0), (0.5, -0.22), (0.12, -0.05)], 0.09).at(0, 0.55 * fat, 0.15)
        toy.add(ACCENT, fin.turn("z", angle - 90))
    toy.add(METAL, ring(0.19, 0.05, "x").at(0.93 * fat, 0, 0.56 * tall))
    toy.add(GLASS, ball(0.08, 0.17, 0.17).at(0.92 * fat, 0, 0.56 * tall))
    toy.add(METAL, lathe([(0.6 * fat, -0.12), (0.45 * fat, 0.06)]))


def _snowman(toy: Toy, u: Draw) -> None:
    low, mid, head = u(0.52, 0.6), u(0.38, 0.44), u(0.29, 0.34)
    z1 = 0.9 * low
    z2 = z1 + 0.8 * low + 0.55 * mid
    z3 = z2 + 0.75 * mid + 0.65 * head
    toy.add(MAIN, ball(low).at(0, 0, z1), ball(mid).at(0, 0, z2), ball(head).at(0, 0, z3))
    toy.add(ACCENT, ring(0.29, 0.085).at(0, 0, z3 - 0.78 * head))
    toy.add(ACCENT, rod((0, 0, z3 + 0.72 * head), (0, 0, z3 + 0.86 * head), 0.36))
    toy.add(ACCENT, rod((0, 0, z3 + 0.8 * head), (0, 0, z3 + 1.75 * head), 0.23))
    toy.add(CARROT, lathe([(0.08, 0), (0.02, 0.3)], 10).turn("y", 90).at(0.92 * head, 0, z3 - 0.03))
    toy.eyes(0.86 * head, z3 + 0.1, 0.12, 0.085)
    for z in (z2 + 0.12, z2 - 0.14):
        toy.add(DARK, ball(0.06).at(mid * 0.95, 0, z))


def _chair(toy: Toy, u: Draw) -> None:
    wide, deep, seat, back = u(0.8, 0.95), u(0.75, 0.9), u(0.55, 0.7), u(0.75, 0.95)
    toy.add(MAIN, box(deep, wide, 0.16, 0.06).at(0, 0, seat))
    toy.add(MAIN, box(0.15, wide, back, 0.07).at(-deep / 2 + 0.07, 0, seat + back / 2))
    for x in (-deep / 2 + 0.1, deep / 2 - 0.1):
        for y in (-wide / 2 + 0.1, wide / 2 - 0.1):
            toy.add(ACCENT, rod((1.1 * x, 1.1 * y, 0), (x, y, seat), 0.06, 0.08))
    toy.add(CREAM, plate(heart(0.24), 0.08).at(-deep / 2 + 0.15, 0, seat + 0.58 * back))


def _mug(toy: Toy, u: Draw) -> None:
    r, tall = u(0.55, 0.65), u(1.0, 1.2)
    outer = [(r - 0.06, 0), (r, 0.07), (r, tall - 0.03), (r - 0.04, tall), (r - 0.08, tall - 0.03)]
    toy.add(MAIN, lathe([*outer, (r - 0.1, 0.72 * tall)]))
    toy.add(DARK, lathe([(r - 0.085, 0.70 * tall), (r - 0.085, 0.8 * tall)]))
    toy.add(ACCENT, ring(0.30, 0.085, "x").stretch(1, 1, 1.15).at(0, r + 0.08, 0.5 * tall))
    toy.add(ACCENT, plate(heart(0.30), 0.1).at(r, 0, 0.5 * tall))


def _lamp(toy: Toy, u: Draw) -> None:
    low, high, shade, tall = u(0.62, 0.75), u(0.3, 0.38), u(0.6, 0.7), u(1.35, 1.55)
    toy.add(ACCENT, lathe(curve([(0.42, 0), (0.42, 0.08), (0.16, 0.16), (0.12, 0.3)])))
    toy.add(ACCENT, ball(0.2, 0.2, 0.24).at(0, 0, 0.42), rod((0, 0, 0.3), (0, 0, tall - 0.2), 0.06))
    toy.add(MAIN, lathe([(low - 0.04, tall - shade), (low, tall - shade + 0.03), (high, tall), (high - 0.06, tall)]))
    toy.add(LIGHT, lathe([(low - 0.1, tall - shade - 0.015), (low - 0.1, tall - shade + 0.05)]))
    x = 0.5 * (low + high)
    toy.add(CREAM, plate(star(0.24), 0.08).turn("y", -25).at(x + 0.02, 0, tall - 0.5 * shade))
    toy.add(LIGHT, rod((0.3, 0, tall - shade - 0.35), (0.3, 0, tall - shade), 0.02))
    toy.add(LIGHT, ball(0.07).at(0.3, 0, tall - shade - 0.38))


def _robot(toy: Toy, u: Draw) -> None:
    wide, tall, head = u(0.72, 0.85), u(0.7, 0.82), u(0.46, 0.54)
    toy.add(MAIN, box(0.5, wide, tall, 0.1).at(0, 0, 0.45 + tall / 2))
    top = 0.45 + tall + 0.06
    toy.add(MAIN, box(0.46, 1.25 * head, head, 0.1).at(0, 0, top + head / 2))
    toy.add(
        METAL, rod((0, 0, top - 0.1), (0, 0, top + 0.05), 0.13), rod((0, 0, top + head), (0, 0, top + head + 0.2), 0.04)
    )
    toy.add(ACCENT, ball(0.1).at(0, 0, top + head + 0.24))
    for y in (-1, 1):
        toy.add(ACCENT, capsule((0, y * (wide / 2 + 0.1), 0.5), (0, y * (wide / 2 + 0.1), 0.35 + tall), 0.12))
        toy.add(ACCENT, capsule((0, y * 0.22, 0.13), (0, y * 0.22, 0.45), 0.15))
        toy.add(ACCENT, box(0.42, 0.28, 0.16, 0.06).at(0.06, y * 0.22, 0.08))
    toy.add(METAL, box(0.06, 0.5 * wide, 0.36 * tall, 0.03).at(0.25, 0, 0.45 + 0.5 * tall))
    toy.add(LIGHT, ball(0.06).at(0.28, -0.1, 0.45 + 0.5 * tall))
    toy.add(CARROT, ball(0.06).at(0.28, 0.1, 0.45 + 0.5 * tall))
    toy.eyes(0.23, top + 0.55 * head, 0.15, 0.115)


def _donut(toy: Toy, u: Draw) -> None:
    big, fat = u(0.62, 0.7), u(0.29, 0.34)
    lean = -u(15, 30)
    dough = ring(big, fat, "x").stretch(0.95, 1, 1)
    icing = ring(big, fat * 1.06, "x").stretch(0.85, 1, 1).at(0.1)
    toy.add(WOOD, dough.turn("y", lean))
    toy.add(MAIN, icing.turn("y", lean))
    for i in range(11):
        angle, r = i * 2 * np.pi / 11, big + 0.13 * (-1) ** i
        sprinkle = capsule((0, -0.06, 0), (0, 0.06, 0), 0.04).turn("x", 70 * i)
        toy.add(ACCENT, sprinkle.at(0.1 + 0.86 * fat, r * np.cos(angle), r * np.sin(angle)).turn("y", lean))


def _duck(toy: Toy, u: Draw) -> None:
    long, head = u(0.72, 0.82), u(0.36, 0.42)
    toy.add(MAIN, ball(long, 0.52, 0.48).at(-0.1, 0, 0.46))
    toy.add(MAIN, ball(0.26, 0.26, 0.3).turn("y", -40).at(-0.1 - 0.9 * long, 0, 0.72))
    z = 0.8 + 0.75 * head
    toy.add(MAIN, ball(head).at(0.32, 0, z))
    toy.add(ACCENT, ball(0.24, 0.2, 0.075).at(0.32 + head + 0.06, 0, z - 0.07))
    toy.eyes(0.32 + 0.78 * head, z + 0.13, 0.19, 0.1)
    for y in (-1, 1):
        toy.add(MAIN, ball(0.42, 0.1, 0.24).turn("y", -12).at(-0.2, 0.5 * y, 0.55))
        toy.add(ACCENT, ball(0.2, 0.13, 0.05).at(0.12, 0.2 * y, 0.02))


def _boat(toy: Toy, u: Draw) -> None:
    long, wide = u(0.95, 1.1), u(0.42, 0.5)
    hull = ball(long, wide, 0.5)
    flat = hull.vertices.copy()
    flat[:, 2] = np.where(flat[:, 2] > 0, 0.12 * flat[:, 2], flat[:, 2])
    flat[:, 2] += 0.18 * (flat[:, 0] / long) ** 2 * (flat[:, 0] > 0)
    toy.add(MAIN, Solid(flat, hull.faces).at(0, 0, 0.5))
    toy.add(WOOD, ball(0.88 * long, 0.86 * wide, 0.05).at(-0.02, 0, 0.55))
    toy.add(WHITE, box(0.55, 0.5, 0.32, 0.06).at(-0.3, 0, 0.7))
    toy.add(GLASS, box(0.05, 0.34, 0.14, 0.02).at(-0.02, 0, 0.74))
    mast = u(1.0, 1.2)
    toy.add(WOOD, rod((0.12, 0, 0.5), (0.12, 0, 0.6 + mast), 0.045))
    sail = plate([(0.06, 0.02), (0.75, 0.04), (0.06, 0.85 * mast)], 0.07).turn("z", 90)
    toy.add(ACCENT, sail.at(0.1, 0, 0.62))
    jib = plate([(-0.06, 0.1), (-0.55, 0.1), (-0.06, 0.7 * mast)], 0.07).turn("z", 90)
    toy.add(ACCENT, jib.at(0.13, 0, 0.6))


def _cactus(toy: Toy, u: Draw) -> None:
    fat, tall = u(0.28, 0.34), u(1.25, 1.45)
    toy.add(ACCENT, lathe([(0.36, 0), (0.46, 0.38), (0.5, 0.4), (0.5, 0.5), (0.42, 0.5)]))
    toy.add(MAIN, capsule((0, 0, 0.4), (0, 0, tall), fat))
    for y, z in ((1, 0.75), (-1, 0.95)):
        reach = fat + 0.3
        toy.add(MAIN, capsule((0, y * 0.8 * fat, z), (0, y * reach, z), 0.15))
        toy.add(MAIN, capsule((0, y * reach, z), (0, y * reach, z + u(0.25, 0.4)), 0.15))
    toy.add(
        COLORS["pink"],
        *(ball(0.12, 0.12, 0.1).at(0.11 * np.cos(a), 0.11 * np.sin(a), tall + fat) for a in (0, 2.1, 4.2)),
    )
    toy.eyes(0.93 * fat, 0.82 * tall, 0.13, 0.105)


def _tower(toy: Toy, u: Draw) -> None:
    fat, tall = u(0.44, 0.52), u(1.0, 1.2)
    toy.add(MAIN, lathe([(fat + 0.1, 0), (fat + 0.06, 0.12), (fat, 0.16), (fat, tall), (fat + 0.1, tall + 0.06)]))
    toy.add(MAIN, lathe([(fat + 0.1, tall + 0.05), (fat + 0.1, tall + 0.2)]))
    for a in np.arange(8) * 45:
        toy.add(MAIN, box(0.16, 0.2, 0.22, 0.03).at(fat + 0.03, 0, tall + 0.28).turn("z", float(a)))
    toy.add(ACCENT, lathe([(0.8 * fat, tall + 0.2), (0.03, tall + 0.95), (0, tall + 0.95)]))
    toy.add(WOOD, box(0.14, 0.34, 0.46, 0.06).at(fat, 0, 0.3))
    toy.add(DARK, box(0.1, 0.16, 0.26, 0.05).at(fat - 0.02, 0, 0.75 * tall))
    toy.add(METAL, rod((0, 0, tall + 0.85), (0, 0, tall + 1.25), 0.025))
    toy.add(LIGHT, plate([(0, 0.1), (0.3, 0.0), (0, -0.1)], 0.05).at(0, 0.0, tall + 1.14))


def _ice_cream(toy: Toy, u: Draw) -> None:
    fat, tall = u(0.42, 0.48), u(0.95, 1.1)
    toy.add(WOOD, lathe([(0.05, 0), (fat - 0.03, tall - 0.06), (fat + 0.03, tall - 0.04), (fat + 0.03, tall + 0.06)]))
    toy.add(MAIN, ball(fat + 0.09, fat + 0.09, fat).at(0, 0, tall + 0.3))
    toy.add(MAIN, ball(0.74 * fat).at(0, 0, tall + 0.3 + 0.95 * fat))
    toy.add(ACCENT, ball(0.14).at(0, 0, tall + 0.36 + 1.72 * fat))
    toy.add(LEAF, rod((0, 0, tall + 0.45 + 1.72 * fat), (0.05, 0, tall + 0.68 + 1.72 * fat), 0.025))
    toy.eyes(fat + 0.03, tall + 0.34, 0.17, 0.115)


def _apple(toy: Toy, u: Draw) -> None:
    fat, tall = u(0.78, 0.88), u(1.25, 1.4)
    body = [(0.1, 0.08), (0.35, 0), (0.8 * fat, 0.2 * tall), (fat, 0.58 * tall), (0.72 * fat, 0.94 * tall)]
    toy.add(MAIN, lathe(curve([*body, (0.3, tall), (0.08, 0.88 * tall)])))
    toy.add(COLORS["brown"], rod((0, 0, 0.85 * tall), (-0.06, 0.03, tall + 0.28), 0.05))
    toy.add(ACCENT, ball(0.12, 0.3, 0.06).turn("x", 25).at(0, 0.3, tall + 0.18))
    toy.eyes(0.93 * fat, 0.6 * tall, 0.22, 0.15)
    toy.add(DARK, ball(0.05, 0.12, 0.045).at(0.95 * fat, 0, 0.4 * tall))


def _fish(toy: Toy, u: Draw) -> None:
    long, fat, tall = u(0.8, 0.92), u(0.3, 0.36), u(0.46, 0.54)
    toy.add(MAIN, ball(long, fat, tall).at(0, 0, 0.7))
    tail = plate([(0.05, 0.0), (0.5, 0.4), (0.38, 0.0), (0.5, -0.4)], 0.12).turn("z", 90)
    toy.add(ACCENT, tail.at(-0.82 * long, 0, 0.7))
    dorsal = plate([(-0.3, 0), (0.4, 0.0), (0.35, 0.34), (0.1, 0.26)], 0.1).turn("z", 90)
    toy.add(ACCENT, dorsal.at(0, 0, 0.7 + 0.88 * tall))
    for y in (-1, 1):
        toy.add(ACCENT, ball(0.24, 0.06, 0.14).turn("y", 25).turn("z", -30 * y).at(-0.05, y * (fat + 0.06), 0.58))
    toy.eyes(0.72 * long, 0.83, 0.2, 0.12)
    toy.add(COLORS["pink"], ring(0.085, 0.045, "x").at(0.98 * long, 0, 0.62))


def _airplane(toy: Toy, u: Draw) -> None:
    long, fat, span = u(0.95, 1.05), u(0.25, 0.3), u(1.0, 1.15)
    toy.add(MAIN, ball(long, fat, fat * 1.05))
    toy.add(ACCENT, ball(0.27, span, 0.07).at(0.12, 0, -0.02))
    toy.add(ACCENT, ball(0.16, 0.42, 0.05).at(-0.82 * long, 0, 0.08))
    toy.add(
        ACCENT, plate([(0.0, 0.0), (0.35, 0.0), (0.42, 0.45), (0.2, 0.45)], 0.08).turn("z", 90).at(-0.6 * long, 0, 0.1)
    )
    toy.add(GLASS, ball(0.26, 0.19, 0.2).at(0.32, 0, 0.8 * fat))
    toy.add(METAL, ball(0.14).at(long, 0, 0))
    blade = u(0, 90)
    toy.add(DARK, box(0.05, 0.85, 0.1, 0.02).turn("x", blade).at(long + 0.08, 0, 0))


def _table(toy: Toy, u: Draw) -> None:
    deep, wide, tall = u(0.8, 1.0), u(1.3, 1.6), u(0.75, 0.9)
    toy.add(MAIN, box(deep, wide, 0.14, 0.05).at(0, 0, tall))
    toy.add(MAIN, box(0.7 * deep, 0.82 * wide, 0.26, 0.03).at(-0.05, 0, tall - 0.16))
    toy.add(CREAM, box(0.06, 0.46 * wide, 0.2, 0.03).at(0.31 * deep, 0, tall - 0.18))
    toy.add(DARK, ball(0.06).at(0.31 * deep + 0.07, 0, tall - 0.18))
    for x in (-deep / 2 + 0.1, deep / 2 - 0.1):
        for y in (-wide / 2 + 0.12, wide / 2 - 0.12):
            toy.add(ACCENT, rod((x, y, 0), (x, y, tall), 0.07, 0.09))


def _sofa(toy: Toy, u: Draw) -> None:
    deep, wide, back = u(0.75, 0.85), u(1.5, 1.8), u(0.5, 0.62)
    toy.add(MAIN, box(deep, wide, 0.32, 0.1).at(0, 0, 0.32))
    toy.add(MAIN, box(0.3, wide, back + 0.3, 0.13).at(-deep / 2 + 0.12, 0, 0.3 + back / 2))
    for y in (-1, 1):
        toy.add(MAIN, box(deep, 0.26, 0.5, 0.12).at(0, y * (wide / 2 - 0.02), 0.42))
        toy.add(ACCENT, box(0.17, 0.42, 0.4, 0.08).turn("y", -14).at(-deep / 2 + 0.38, y * 0.24 * wide, 0.66))
        for x in (-deep / 2 + 0.1, deep / 2 - 0.1):
            toy.add(WOOD, rod((x, y * (wide / 2 - 0.1), 0), (x, y * (wide / 2 - 0.1), 0.2), 0.06))


def _hat(toy: Toy, u: Draw) -> None:
    brim, crown, tall = u(0.85, 0.98), u(0.48, 0.55), u(0.6, 0.8)
    toy.add(MAIN, lathe(curve([(brim - 0.04, 0.1), (brim, 0.15), (crown + 0.1, 0.09), (crown, 0.2)])))
    toy.add(MAIN, lathe(curve([(crown, 0.1), (0.95 * crown, 0.7 * tall), (0.8 * crown, tall), (0, tall + 0.02)])))
    toy.add(ACCENT, lathe([(crown, 0.14), (crown + 0.04, 0.16), (crown + 0.03, 0.34), (crown, 0.36)]))
    toy.add(ACCENT, plate(star(0.27), 0.12).at(crown + 0.05, 0, 0.36))
    toy.add(LIGHT, ball(0.08).at(crown + 0.12, 0, 0.36))


def _train(toy: Toy, u: Draw) -> None:
    long, fat, wheel = u(1.0, 1.2), u(0.3, 0.35), u(0.2, 0.24)
    z = wheel + 0.12
    toy.add(MAIN, box(long + 0.65, 0.62, 0.14, 0.04).at(-0.3, 0, z))
    toy.add(MAIN, rod((-0.3, 0, z + fat), (long / 2 + 0.02, 0, z + fat), fat))
    toy.add(METAL, rod((long / 2 - 0.02, 0, z + fat), (long / 2 + 0.08, 0, z + fat), 0.8 * fat))
    toy.add(LIGHT, ball(0.07, 0.12, 0.12).at(long / 2 + 0.08, 0, z + fat))
    cabin = u(0.8, 0.95)
    toy.add(MAIN, box(0.55, 0.66, cabin, 0.05).at(-long / 2 - 0.2, 0, z + cabin / 2))
    toy.add(ACCENT, box(0.75, 0.8, 0.1, 0.04).at(-long / 2 - 0.2, 0, z + cabin + 0.03))
    toy.add(GLASS, box(0.3, 0.7, 0.26, 0.03).at(-long / 2 - 0.2, 0, z + 0.68 * cabin))
    toy.add(ACCENT, lathe(curve([(0.1, 0), (0.1, 0.25), (0.18, 0.42)])).at(long / 4, 0, z + 1.8 * fat))
    for x in (-long / 2 - 0.2, -0.08, 0.32 * long):
        for y in (-1, 1):
            toy.add(ACCENT, rod((x, y * 0.28, wheel), (x, y * 0.42, wheel), wheel))
    toy.add(CARROT, lathe([(0.3, 0), (0.12, 0.24)], 4).turn("z", 45).stretch(0.8, 1.2, 1).at(long / 2 + 0.08, 0, 0.05))


def _flower_pot(toy: Toy, u: Draw) -> None:
    r, tall = u(0.5, 0.58), u(0.62, 0.75)
    toy.add(MAIN, lathe([(0.7 * r, 0), (r, 0.78 * tall), (r + 0.08, 0.8 * tall), (r + 0.08, tall), (r - 0.05, tall)]))
    toy.add(COLORS["brown"], lathe([(r - 0.06, tall - 0.05), (r - 0.06, tall + 0.01)]))
    top = tall + u(0.55, 0.7)
    toy.add(LEAF, rod((0, 0, tall), (0.05, 0, top), 0.06))
    for y in (-1, 1):
        toy.add(LEAF, ball(0.13, 0.3, 0.07).turn("x", -32 * y).at(0, -0.28 * y, tall + 0.22))
    for a in np.arange(6) * np.pi / 3:
        toy.add(ACCENT, ball(0.09, 0.19, 0.19).at(0.08, 0.26 * np.cos(a), top + 0.26 * np.sin(a)))
    toy.add(LIGHT, ball(0.13, 0.18, 0.18).at(0.12, 0, top))
    toy.eyes(0.88 * r, 0.5 * tall, 0.16, 0.115)


# kind -> (builder, words for it, what ACCENT colors, the accent's usual color)
KINDS: dict[str, tuple[Callable[[Toy, Draw], None], tuple[str, ...], str, str]] = {
    "mushroom": (_mushroom, ("mushroom", "toadstool"), "spots", "white"),
    "pine tree": (_pine_tree, ("pine tree", "fir tree"), "baubles", "red"),
    "car": (_car, ("car", "automobile"), "wheels", "black"),
    "house": (_house, ("house", "cottage"), "roof", "brown"),
    "rocket": (_rocket, ("rocket", "spaceship"), "fins", "white"),
    "snowman": (_snowman, ("snowman",), "scarf", "black"),
    "chair": (_chair, ("chair", "seat"), "legs", "brown"),
    "mug": (_mug, ("mug", "cup"), "handle", "white"),
    "table lamp": (_lamp, ("table lamp", "lamp"), "stand", "brown"),
    "robot": (_robot, ("robot", "android"), "arms", "white"),
    "donut": (_donut, ("donut", "doughnut"), "sprinkles", "white"),
    "duck": (_duck, ("duck", "duckling"), "beak", "orange"),
    "boat": (_boat, ("boat", "sailing boat"), "sails", "white"),
    "cactus": (_cactus, ("cactus",), "pot", "orange"),
    "castle tower": (_tower, ("castle tower", "tower"), "roof", "blue"),
    "ice cream": (_ice_cream, ("ice cream", "ice cream cone"), "cherry", "red"),
    "apple": (_apple, ("apple",), "leaf", "green"),
    "fish": (_fish, ("fish",), "fins", "orange"),
    "airplane": (_airplane, ("airplane", "plane"), "wings", "white"),
    "table": (_table, ("table", "desk"), "legs", "brown"),
    "sofa": (_sofa, ("sofa", "couch"), "cushions", "yellow"),
    "hat": (_hat, ("hat",), "band", "black"),
    "train engine": (_train, ("train engine", "locomotive"), "wheels", "black"),
    "flower pot": (_flower_pot, ("flower pot", "potted flower"), "petals", "pink"),
}
