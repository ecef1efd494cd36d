"""Draws bench/results/ over time: docs/results.md and docs/results.svg. The standard library only.

    python3 bench/draw.py            # writes both
    python3 bench/draw.py --check    # fails if they are not what it would write
"""

import argparse
import html
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLOURS = ["#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#b8860b", "#4a4a4a"]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, GAP = 860, 190, 62, 150, 34, 46
NEEDED = {"schema": int, "date": str, "commit": str, "summary": list, "gpus": list, "preset": str}


def results(folder):
    """Every run's result, oldest first, under its file's name."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except ValueError as error:
            sys.exit(f"{path}: no JSON ({error})")
        for field, kind in NEEDED.items():
            if not isinstance(result.get(field), kind):
                sys.exit(f"{path}: field `{field}` is missing or not of {kind.__name__}: is it a result.json of bench/gpu.sh?")
        if result["schema"] != 1:
            sys.exit(f"{path}: schema {result['schema']} is unknown (known is 1)")
        if not result["gpus"] or result["preset"] != "sd15":
            sys.exit(f"{path}: not measured on a GPU at full size: such runs are not kept")
        found.append((path.name, result))
    return sorted(found, key=lambda named: (named[1]["date"], named[0]))


def gpu(result):
    return result["gpus"][0]["name"]


def series(runs, of):
    """{(GPU, micro-batch): [(run's index, value)]} of one field of the summaries."""
    lines = {}
    for index, (_, result) in enumerate(runs):
        for row in result["summary"]:
            if row.get(of) is not None:
                lines.setdefault((gpu(result), row["micro_batch"]), []).append((index, row[of]))
    return lines


def panel(runs, title, of, scale, top):
    """One chart: a line for each GPU and micro-batch."""
    lines = series(runs, of)
    most = max((value * scale for line in lines.values() for _, value in line), default=1.0) * 1.1 or 1.0
    span = max(len(runs) - 1, 1)
    x = lambda index: LEFT + (WIDTH - LEFT - RIGHT) * (index / span if len(runs) > 1 else 0.5)
    y = lambda value: top + HEIGHT - HEIGHT * value * scale / most
    parts = [f'<text x="{LEFT}" y="{top - 10}" font-weight="bold">{html.escape(title)}</text>']
    for step in range(5):
        value = most * step / 4
        at = top + HEIGHT - HEIGHT * step / 4
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for number, ((name, batch), line) in enumerate(sorted(lines.items())):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(index):.1f}" cy="{y(value):.1f}" r="3.5" fill="{colour}"/>' for index, value in line]
        label = html.escape(f"{name.removeprefix('NVIDIA ')}, {batch}")
        parts.append(f'<text x="{WIDTH - RIGHT + 12}" y="{top + 12 + 16 * number}" fill="{colour}">{label}</text>')
    for index, (_, result) in enumerate(runs):
        parts.append(f'<text x="{x(index):.1f}" y="{top + HEIGHT + 16}" text-anchor="middle">{html.escape(result["date"][:10])}</text>')
    return parts


PANELS = [
    ("Images a second, by GPU and micro-batch", "ella", 1),
    ("Share of the measured bf16 peak, %", "share_of_peak", 100),
    ("Ratio to the compiled peer", "over_compiled", 1),
    ("Ratio to the eager peer", "over_eager", 1),
]


def svg(runs):
    parts = []
    for number, (title, of, scale) in enumerate(PANELS):
        parts += panel(runs, title, of, scale, TOP + number * (HEIGHT + GAP + TOP))
    height = len(PANELS) * (HEIGHT + GAP + TOP)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height}" fill="white"/>', *parts, "</svg>"]) + "\n"


def number(value, form, unit=""):
    return "–" if value is None else f"{value:{form}}{unit}"


def page(runs):
    """The page's text."""
    lines = ["# Results over time", "", "`bench/draw.py` makes this page of `bench/results/`, where `bench/gpu.sh`'s runs are kept.", ""]
    if not runs:
        lines += ["There are none yet: ella has not been measured on a GPU. [performance.md](performance.md) says what arithmetic expects.", ""]
        return "\n".join(lines)
    lines += ["![Images a second, share of the peak and ratios to the peer over time](results.svg)", ""]
    heads = ["run", "GPU", "commit", "micro-batch", "images/s", "compiled peer", "eager peer", "ella / compiled", "ella / eager", "of the peak"]
    lines += [f"| {' | '.join([*heads, 'memory'])} |"]
    lines += ["|---" * 11 + "|"]
    for name, result in reversed(runs):
        for row in result["summary"]:
            share, memory = row.get("share_of_peak"), row.get("peak_memory_bytes")
            cells = [
                f"{result['date'][:10]}: `{name}`", gpu(result), f"`{result['commit'][:10]}`", str(row["micro_batch"]),
                *(number(row.get(of), ".1f") for of in ("ella", "compiled", "eager")),
                *(number(row.get(of), ".2f") for of in ("over_compiled", "over_eager")),
                number(share and 100 * share, ".1f", " %"), number(memory and memory / 2**30, ".1f", " GiB"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not what this makes of the results")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench/results")
    parser.add_argument("--docs", type=pathlib.Path, default=ROOT / "docs")
    args = parser.parse_args()
    runs = results(args.results)
    wanted = {"results.md": page(runs), "results.svg": svg(runs) if runs else None}
    for name, text in wanted.items():
        path = args.docs / name
        there = path.read_text() if path.is_file() else None
        if there == text:
            continue
        if args.check:
            sys.exit(f"{path} is not what bench/draw.py makes of {args.results}: run it, and commit the page")
        if text is None:
            path.unlink()
        else:
            args.docs.mkdir(exist_ok=True)
            path.write_text(text)


if __name__ == "__main__":
    main()
