"""Draws the losses of runs as a picture: `plot_curves.py OUT.svg NAME=RUN/metrics.jsonl …`. Needs Python alone.

Losses are means over ten steps, since those of single steps differ more from step to step than runs from each other.
"""

import json
import sys

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 360, 56, 40, 28
COLOURS = ["#1f6feb", "#d1242f", "#1a7f37", "#8250df"]
MEAN_OVER = 10


def read(path):
    with open(path) as file:
        records = [json.loads(line) for line in file]
    steps = [(r["step"], r["loss"]) for r in records if "step" in r and "loss" in r]
    if len(steps) < MEAN_OVER:
        sys.exit(f"{path}: {len(steps)} steps with a loss; {MEAN_OVER} are needed")
    parts = [steps[i : i + MEAN_OVER] for i in range(0, len(steps) - MEAN_OVER + 1, MEAN_OVER)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def main():
    if len(sys.argv) < 3 or not all("=" in arg for arg in sys.argv[2:]):
        sys.exit(__doc__)
    curves = [(name, read(path)) for name, path in (arg.split("=", 1) for arg in sys.argv[2:])]
    points = [point for _, curve in curves for point in curve]
    last = max(step for step, _ in points)
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)

    def place(step, loss):
        x = LEFT + (WIDTH - LEFT - 16) * step / last
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / ((high - low) or 1.0)
        return f"{x:.1f},{y:.1f}"

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for i in range(5):
        loss = low + (high - low) * i / 4
        x, y = place(0, loss).split(",")
        out.append(f'<path d="M{x},{y}H{WIDTH - 16}" stroke="#d0d7de"/>')
        out.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{loss:.2f}</text>')
        step = last * i // 4
        x = place(step, low).split(",")[0]
        out.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>')
    out.append(f'<text x="{WIDTH // 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    for i, (name, curve) in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        dash = "" if i == 0 else ' stroke-dasharray="6 4"'
        line = " ".join(place(*point) for point in curve)
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
        out.append(f'<text x="{LEFT + 8 + 160 * i}" y="18" fill="{colour}">{name}</text>')
    out.append("</svg>")
    with open(sys.argv[1], "w") as file:
        file.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
