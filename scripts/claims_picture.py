"""docs/pictures/dense.svg, the picture on README's first screen: python3 scripts/claims_picture.py claims >docs/pictures/dense.svg

What `ella claims --quick` drew of the first dense prompts of three objects and more, all four pictures of each, nothing chosen."""

import base64
import csv
import sys
import textwrap
from html import escape
from pathlib import Path

PROMPTS, SIDE, GAP, TEXT = 3, 224, 16, 330
FONT = 'font-family="system-ui, sans-serif" fill="#111"'


def dense_prompts(suite):
    """The names and texts of prompts that ask for three objects or more, in the suite's order."""
    objects, texts = {}, {}
    with open(suite, newline="") as file:
        for row in csv.DictReader(file):
            texts[row["item_id"]] = row["text"]
            objects[row["item_id"]] = objects.get(row["item_id"], 0) + (row["category_broad"] == "entity")
    return [(name, text) for name, text in texts.items() if objects[name] >= 3][:PROMPTS]


def picture(file, x, y):
    data = base64.b64encode(Path(file).read_bytes()).decode()
    half = SIDE / 2
    tiles = f'<path d="M{x + half} {y}v{SIDE}M{x} {y + half}h{SIDE}" stroke="#fff" stroke-width="4"/>'
    return f'<image x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" href="data:image/png;base64,{data}"/>{tiles}'


def main(claims):
    columns = [("the base’s own CLIP", "base-seed-1"), ("with the connector", "tsc-6-seed-1")]
    lefts = [TEXT + GAP + number * (SIDE + GAP) for number in range(len(columns))]
    top = 32
    prompts = dense_prompts(claims / "suite/dense.csv")
    width, height = lefts[-1] + SIDE + GAP, top + len(prompts) * (SIDE + GAP)
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">')
    print(f'<rect width="{width}" height="{height}" fill="#fff"/>')
    for (title, _), left in zip(columns, lefts):
        print(f'<text x="{left + SIDE / 2}" y="22" text-anchor="middle" font-size="15" font-weight="600" {FONT}>{title}</text>')
    for number, (name, text) in enumerate(prompts):
        y = top + number * (SIDE + GAP)
        for row, line in enumerate(textwrap.wrap(text, 42)):
            print(f'<text x="{GAP}" y="{y + 15 + row * 19}" font-size="14" {FONT}>{escape(line)}</text>')
        for (_, run), left in zip(columns, lefts):
            print(picture(claims / "drawn" / run / "dense" / f"{name}.png", left, y))
    print("</svg>")


main(Path(sys.argv[1]))
