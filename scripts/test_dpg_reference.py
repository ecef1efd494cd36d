"""Of the reference of DPG-Bench's scores: the test data is what it makes, and small cases come out as reckoned by hand."""

import unittest

import dpg_reference as reference


class Reference(unittest.TestCase):
    def test_the_data_that_is_checked_in_is_what_it_makes(self):
        for name, text in reference.files().items():
            self.assertEqual((reference.FOLDER / name).read_text(encoding="utf-8"), text, f"{name}: run scripts/dpg_reference.py")

    def test_a_case_reckoned_by_hand(self):
        rows = [reference.row("x", 1, "0", "global (a)")]
        rows += [reference.row("a", 1, "0", "entity - whole (b)"), reference.row("a", 2, "1", "global (c)"), reference.row("b", 3, "7", "global (d)")]
        answers = {"a": {(0, 1): "no", (0, 2): "yes", (1, 1): "yes", (1, 2): "Yes"}, "b": {(0, 3): "yes", (1, 3): "yes"}, "x": None}
        found = reference.score(rows, answers, 2)
        # Of the first tile nothing stands, of the second one of two; the last tile's answers alone make the categories.
        self.assertEqual(found["by_prompt"], {"a": {"tiles": [0.0, 0.5], "score": 0.25}})
        self.assertEqual((found["score"], found["level2"]), (25.0, {"entity - whole": 100.0, "global": 0.0}))
        self.assertEqual(found["failed"], ["b", "x"])


if __name__ == "__main__":
    unittest.main()
