"""Answers the questions of `ella dpg questions` with a model of transformers, for `ella dpg score`: an example to change to your needs.

    python3 bench/dpg_answer.py --questions questions.jsonl --out answers.jsonl --model Salesforce/blip-vqa-base

A run that was stopped goes on where it was: the same command again asks only what has no answer yet. Needs torch, transformers and pillow.
"""

import argparse
import itertools
import json
import pathlib


def key(line):
    return line["item_id"], line["tile"], line["proposition_id"]


def answered(path):
    """What the answers file has already. A last line that was cut off is taken away, so that the next one begins a line."""
    if not path.is_file():
        return set()
    whole, end, _ = path.read_bytes().rpartition(b"\n")
    path.write_bytes(whole + end)
    return {key(line) for line in map(json.loads, whole.splitlines()) if "error" not in line}


def batches(lines, size):
    """Questions about the same picture, at most so many at once."""
    for image, of in itertools.groupby(lines, key=lambda line: line["image"]):
        while batch := list(itertools.islice(of, size)):
            yield image, batch


def answer_all(lines, out, size, open_image, ask):
    """Asks `ask(tiles, questions) -> texts` what is not answered yet, and appends to the file. Gives the numbers of answers and of errors.

    They are written as they are: `ella dpg score` takes "yes" alone for a yes, as the official script does."""
    there, counts, failed = answered(out), [0, 0], set()
    with out.open("a", encoding="utf-8") as file:
        for image, batch in batches([line for line in lines if key(line) not in there], size):
            if image in failed:
                continue
            try:
                tiles = [open_image(image).crop(line["box"]) for line in batch]
            except OSError as error:
                failed.add(image)
                told = [{"item_id": batch[0]["item_id"], "error": str(error)}]
            else:
                texts = ask(tiles, [line["question"] for line in batch])
                told = [dict(zip(("item_id", "tile", "proposition_id", "answer"), (*key(line), text))) for line, text in zip(batch, texts, strict=True)]
            counts["error" in told[0]] += len(told)
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in told)
            file.flush()
    return counts


def load(name, device):
    import torch
    from PIL import Image
    from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

    processor, model = AutoProcessor.from_pretrained(name), AutoModelForVisualQuestionAnswering.from_pretrained(name).to(device).eval()

    @torch.inference_mode()
    def ask(tiles, questions):
        inputs = processor(images=tiles, text=questions, padding=True, return_tensors="pt").to(device)
        if hasattr(model, "generate"):
            return [text.strip() for text in processor.batch_decode(model.generate(**inputs, max_new_tokens=10), skip_special_tokens=True)]
        return [model.config.id2label[best] for best in model(**inputs).logits.argmax(-1).tolist()]

    return lambda path: Image.open(path).convert("RGB"), ask


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--model", required=True, help="a hub id or folder, such as Salesforce/blip-vqa-base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.questions.read_text(encoding="utf-8").splitlines()]
    answers, errors = answer_all(lines, args.out, args.batch, *load(args.model, args.device))
    print(f"{answers} answers, {errors} pictures that cannot be read: {args.out}")


if __name__ == "__main__":
    main()
