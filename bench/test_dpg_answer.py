"""Of bench/dpg_answer.py, with a model and pictures that are made up. No torch, no pillow."""

import json
import pathlib
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import dpg_answer


class Picture:
    def __init__(self, path):
        if "broken" in path:
            raise OSError(f"cannot identify {path}")
        self.path = path

    def crop(self, box):
        return self.path, tuple(box)


def line(item, tile, question):
    box = [tile % 2 * 4, tile // 2 * 4, tile % 2 * 4 + 4, tile // 2 * 4 + 4]
    return {"image": f"{item}.png", "box": box, "item_id": item, "tile": tile, "proposition_id": question, "question": f"{question}?"}


LINES = [line(item, tile, question) for item in ("a", "broken", "b") for tile in range(4) for question in (1, 2, 5)]


class Answering(unittest.TestCase):
    def setUp(self):
        there = tempfile.TemporaryDirectory()
        self.addCleanup(there.cleanup)
        self.out, self.asked = pathlib.Path(there.name) / "answers.jsonl", []

    def ask(self, tiles, questions):
        self.asked += list(zip(tiles, questions))
        return ["yes" if question == "1?" else "no, it is ñot" for question in questions]

    def run_all(self, ask=None):
        return dpg_answer.answer_all(LINES, self.out, 5, Picture, ask or self.ask)

    def written(self):
        return [json.loads(text) for text in self.out.read_text(encoding="utf-8").splitlines()]

    def test_every_question_is_asked_of_its_tile_once(self):
        self.assertEqual(self.run_all(), [24, 1])
        expected = [((line["image"], tuple(line["box"])), line["question"]) for line in LINES if line["item_id"] != "broken"]
        self.assertEqual(self.asked, expected)
        self.assertEqual(self.written()[0], {"item_id": "a", "tile": 0, "proposition_id": 1, "answer": "yes"})
        self.assertEqual([told for told in self.written() if "error" in told], [{"item_id": "broken", "error": "cannot identify broken.png"}])

    def test_what_was_stopped_goes_on(self):
        self.run_all()
        whole = self.out.read_bytes()
        for cut in (0, 1, 100, len(whole) - 1, len(whole)):
            self.out.write_bytes(whole[:cut])
            self.asked.clear()
            self.run_all()
            keys = sorted(dpg_answer.key(told) for told in self.written() if "error" not in told)
            self.assertEqual(keys, sorted(dpg_answer.key(line) for line in LINES if line["item_id"] != "broken"), cut)
        self.assertEqual(self.asked, [], "the last one was whole")

    def test_what_was_answered_before_a_crash_is_kept(self):
        def crash(tiles, questions):
            if self.asked:
                raise RuntimeError("out of memory")
            return self.ask(tiles, questions)

        with self.assertRaises(RuntimeError):
            self.run_all(crash)
        self.assertEqual(len(self.written()), 5)

    def test_a_model_that_answers_too_little_is_no_silent_loss(self):
        with self.assertRaises(ValueError):
            self.run_all(lambda tiles, questions: ["yes"])


if __name__ == "__main__":
    unittest.main()
