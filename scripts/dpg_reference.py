"""The official scoring of DPG-Bench in plain Python, oddities included, and the test data that `ella dpg score` is compared with.

    python3 scripts/dpg_reference.py            # writes cli/tests/dpg/
    python3 scripts/dpg_reference.py --check    # fails if it is not what this would write

Written from a description of what dpg_bench/compute_dpg_bench.py (TencentQQGYLab/ELLA) does in one process, as slowly and as literally as
that does it: dictionaries that are filled row by row, and exceptions that drop a prompt. The standard library only.
"""

import argparse
import csv
import io
import json
import pathlib
import random
import sys

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "cli/tests/dpg"
COLUMNS = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple", "question_natural_language"]


def read_questions(rows):
    """The dictionaries of every item. The first row after the header is not read."""
    items, previous = {}, ""
    for number, row in enumerate(rows):
        if number == 0:
            continue
        name, question = row["item_id"], int(row["proposition_id"])
        if name != previous:
            items[name] = {"tuples": {}, "parents": {}, "questions": {}}
        items[name]["tuples"][question] = row["tuple"]
        items[name]["parents"][question] = [int(parent.strip()) for parent in row["dependency"].split(",")]
        items[name]["questions"][question] = row["question_natural_language"]
        previous = name
    return items


def score_picture(item, ask, tiles):
    """Scores of the tiles, their mean, and the last tile's answers as they were. Raises what the script would."""
    scores, raw = [], {}
    for tile in range(tiles):
        now = {question: float(ask(tile, question) == "yes") for question in item["questions"]}
        raw = dict(now)
        for question, parents in item["parents"].items():
            for parent in parents:
                if parent != 0 and now[parent] == 0:
                    now[question] = 0
                    break
        scores.append(sum(now.values()) / len(now))
    return scores, sum(scores) / len(scores), raw


def mean(values):
    return sum(values) / len(values) if values else None


def score(rows, answers, tiles):
    """All scores, in per cent as the script prints them. `answers`: {item: {(tile, question): text}}; None for a picture that cannot be opened.

    Every item that has an entry has a file in the folder; an answer that is not there stands for a model that raises."""
    items = read_questions(rows)
    level2, by_prompt, failed = {}, {}, []
    for name, given in answers.items():
        try:
            item = items[name]
            if given is None:
                raise OSError("cannot identify image file")
            scores, average, raw = score_picture(item, lambda tile, question: given[(tile, question)], tiles)
        except (KeyError, OSError):
            failed.append(name)
            continue
        by_prompt[name] = {"tiles": scores, "score": average}
        for question, words in item["tuples"].items():
            level2.setdefault(words.split("(")[0].strip(), []).append(raw[question])
    level1 = {}
    for category, values in level2.items():
        level1.setdefault(category.split("-")[0].strip(), []).extend(values)
    average = mean([prompt["score"] for prompt in by_prompt.values()])
    return {
        "score": None if average is None else 100 * average,
        "level1": {category: 100 * mean(values) for category, values in sorted(level1.items())},
        "level2": {category: 100 * mean(values) for category, values in sorted(level2.items())},
        "by_prompt": dict(sorted(by_prompt.items())),
        "failed": sorted(failed),
    }


def corners():
    """Items that each show one oddity. (item, [(question, dependency, tuple)]), and the answers of the tiles as strings of y and n."""
    items = [
        # Its first row is dropped, and its third question depends on that.
        ("first", [(1, "0", "entity - whole (dog)"), (2, "0", "global (photo)"), (3, "1", "attribute - color (dog, red)")]),
        # Dependencies down the rows, up the rows, and a grandchild before its parent.
        ("down", [(1, "0", "entity - whole (cat)"), (2, "1", "entity - part (cat's tail)"), (3, "2", "attribute - size (tail, long)")]),
        ("up", [(3, "2", "attribute - size (tail, long)"), (2, "1", "entity - part (cat's tail)"), (1, "0", "entity - whole (cat)")]),
        ("parents", [(1, "0", "entity - whole (a)"), (2, "0", "entity - whole (b)"), (3, "1,2", "relation - spatial (a, b, left of)"),
                     (4, " 3 , 0 ", "relation - non-spatial (a, b, look at)")]),
        # A parent that is nowhere: behind one that may be a no, and before it.
        ("late", [(1, "0", "entity - whole (a)"), (2, "1,9", "entity - state (a, asleep)")]),
        ("later", [(1, "0", "entity - whole (a)"), (2, "1,9", "entity - state (a, asleep)")]),
        ("early", [(1, "0", "entity - whole (a)"), (2, "9,1", "entity - state (a, asleep)")]),
        ("itself", [(1, "1", "other - count (a, ==2)"), (2, "3", "other - text (a, \"hi, (there)\")"), (3, "2", "global (style)")]),
        ("missing", [(1, "0", "global (photo)")]),
        ("broken", [(1, "0", "global (photo)")]),
        ("partial", [(1, "0", "global (photo)"), (2, "0", "attribute - texture (a, rough)")]),
        ("near", [(1, "0", "attribute - other (a, old)"), (2, "0", "attribute - shape (a, round)")]),
        # Its rows are not together: see below. Its id again, too.
        ("apart", [(1, "0", "entity - whole (a)"), (2, "1", "attribute - color (a, blue)")]),
        ("tiles", [(1, "0", "global (style)"), (2, "0", "relation (a, b, on)")]),
        ("apart", [(3, "0", "entity - whole (b)"), (3, "0", "entity - whole (b)"), (4, "3", "attribute - color (b, green)")]),
    ]
    tiles = {
        "first": ["yyy", "nyy", "yny", "yyn"], "down": ["yyy", "nyy", "yny", "ynn"], "up": ["yyy", "yyn", "yny", "nnn"],
        "parents": ["yyyy", "ynyy", "nyyy", "yyny"], "late": ["ny", "nn", "ny", "ny"], "later": ["ny", "nn", "yy", "ny"],
        "early": ["yy", "ny", "yy", "yy"],
        "itself": ["yyy", "nyy", "yny", "yyn"], "tiles": ["yy", "yn", "ny", "nn"], "apart": ["yyyy", "yynn", "nnyy", "yyny"],
    }
    rows, answers, lines = [], {}, []
    for name, questions in items:
        rows += [row(name, *question) for question in questions]
        ids = list(dict.fromkeys(question for other, asked in items if other == name for question, *_ in asked))
        if name in tiles and name not in answers:
            words = {"y": "yes", "n": "no"}
            answers[name] = {(tile, question): words[said[at]] for tile, said in enumerate(tiles[name]) for at, question in enumerate(ids)}
    answers["broken"] = None
    answers["partial"] = {(tile, question): "yes" for tile in range(4) for question in (1, 2) if (tile, question) != (3, 2)}
    answers["near"] = {(tile, question): ["yes", "Yes", " yes", "yes."][(tile + question) % 4] for tile in range(4) for question in (1, 2)}
    answers["stranger"] = {(0, 1): "yes"}
    answers["down"][(0, 77)] = "yes"
    return rows, answers


def drawn(seed, items):
    """Items with random graphs, in which about everything happens."""
    draw = random.Random(seed)
    categories = ["entity - whole", "entity - part", "attribute - color", "attribute - size", "relation - spatial", "global", "other - count"]
    rows, answers = [], {}
    for number in range(items):
        name = f"item{number}"
        ids = draw.sample(range(1, 30), draw.randint(1, 12))
        for question in ids:
            parents = [draw.choice(ids) for _ in range(draw.randint(0, 3))]
            if draw.random() < 0.01:
                parents.insert(draw.randint(0, len(parents)), 99)
            rows.append(row(name, question, ",".join(map(str, parents)) or "0", f"{draw.choice(categories)} (x, {question})"))
        fate = draw.random()
        if fate < 0.05:
            continue
        bias = draw.random()
        given = {(tile, question): "yes" if draw.random() < bias else "no" for tile in range(4) for question in ids}
        if fate < 0.1:
            given.pop(draw.choice(list(given)))
        answers[name] = None if 0.1 <= fate < 0.13 else given
    return rows, answers


def row(name, question, dependency, words):
    broad, _, detailed = words.split("(")[0].strip().partition(" - ")
    values = [name, f"A prompt,\nof \"{name}\".", "", str(question), dependency, broad, detailed, words, f"Question {question} of {name}?"]
    return dict(zip(COLUMNS, values))


def csv_text(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def jsonl_text(answers):
    lines = []
    for name, given in answers.items():
        if given is None:
            lines.append({"item_id": name, "error": "cannot identify image file"})
        for (tile, question), text in (given or {}).items():
            lines.append({"item_id": name, "tile": tile, "proposition_id": question, "answer": text})
    return "".join(json.dumps(line) + "\n" for line in lines)


def files():
    """Every file of the test data."""
    made, expected = {}, {}
    for name, (rows, answers) in {"corners": corners(), "drawn": drawn(8, 50)}.items():
        text = csv_text(rows)
        made[f"{name}.csv"], made[f"{name}.jsonl"] = text, jsonl_text(answers)
        read = list(csv.DictReader(io.StringIO(text, newline="")))
        expected[name] = {str(tiles): score(read, answers, tiles) for tiles in (1, 2, 4)}
    made["expected.json"] = json.dumps(expected, indent=1) + "\n"
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the files are not what this makes")
    check = parser.parse_args().check
    for name, text in files().items():
        path = FOLDER / name
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            sys.exit(f"{path} is not what scripts/dpg_reference.py makes: run it")
        if not check:
            FOLDER.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
