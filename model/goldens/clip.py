"""Dumps the goldens of CLIP: the text encoders of SD 1.5, SD 2 and SDXL, tiny, and two tokenizers, from transformers.

    python model/goldens/clip.py model/tests/goldens

Needs torch 2.11 and transformers 5. The tests read only what is checked in; run this again when a golden must change. Each
encoder is a folder: what save_pretrained writes, inputs-N.safetensors and outputs-N.safetensors. Each tokenizer is a folder with
captions.json: the settings of the call, and texts with their ids.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

END = 40  # not the largest id, so that looking for the largest one would be noticed

SIZES = dict(vocab_size=50, hidden_size=24, intermediate_size=40, max_position_embeddings=11, projection_dim=20)

# SD 1.5 and SDXL's first; SD 2; SDXL's second.
CLIPS = {
    "clip-l": (CLIPTextModel, dict(num_hidden_layers=3, num_attention_heads=3, hidden_act="quick_gelu", eos_token_id=2)),
    "clip-h": (CLIPTextModel, dict(num_hidden_layers=2, num_attention_heads=4, hidden_act="gelu", eos_token_id=END)),
    "clip-g": (CLIPTextModelWithProjection, dict(num_hidden_layers=3, num_attention_heads=2, hidden_act="gelu", eos_token_id=END, layer_norm_eps=1e-4)),
}

# Tokens and own lengths of each row.
SHAPES = [(11, [11, 7, 3, 1]), (11, [11, 11]), (4, [2]), (1, [1])]

CAPTIONS = [
    "a red circle left of a blue square",
    "A  Small\tRED square,\n\nabove two green circles!!",
    "the dog's ball isn't what they'd've called it; we'll see, I'm sure you're right",
    "123 apples & 4.5% of №7 … “quoted” — ½ ²",
    "Ünïcödé straße ΣΑΣ İstanbul ﬁne cafe\u0301 café",
    "漢字とかな 🦊🦊 \U0001f469\u200d\U0001f680 שלום",
    "<|startoftext|>a dog<|endoftext|> and <|EndOfText|> a cat!",
    "hello!world ! !! ?! a!b",
    "   ",
    "",
    "it 's 'S ''s don't DON'T",
    "zero\u200bwidth\u00a0nbsp\u3000wide \u0085 next",
    " ".join(["a very long caption of a red square and a blue circle, again and again"] * 9),
]


def randomize(model):
    """Random values everywhere, so that no parameter is without effect."""
    for name, parameter in model.named_parameters():
        width = parameter.shape[-1] if parameter.dim() > 1 else 4
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=width**-0.5)


def dump_clip(folder, kind, config):
    model = kind(CLIPTextConfig(**SIZES, **config)).eval()
    randomize(model)
    model.save_pretrained(folder)
    end = END if config["eos_token_id"] == END else SIZES["vocab_size"] - 1
    for at, (tokens, lengths) in enumerate(SHAPES):
        own = torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]
        ids = torch.randint(3, SIZES["vocab_size"], (len(lengths), tokens))
        ids[ids == end] = 5
        ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = end
        ids[~own] = end  # SD 1.5 pads with the end token
        # diffusers' pipelines mask nothing; the second shape is theirs.
        mask = own.long() if at != 1 else torch.ones_like(own, dtype=torch.long)
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        pooled = out.text_embeds if kind is CLIPTextModelWithProjection else out.pooler_output
        outputs = {"last_hidden_state": out.last_hidden_state, "penultimate_hidden_state": out.hidden_states[-2], "pooled": pooled}
        save_file({"input_ids": ids, "attention_mask": mask}, folder / f"inputs-{at}.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, folder / f"outputs-{at}.safetensors")


def train(texts, count):
    """CLIP's vocabulary with few merges: bytes, bytes at the end of a word, merges, special tokens. `!` has id 0 as in CLIP's."""
    alphabet = sorted(ByteLevel.alphabet())
    words = Counter()
    backend = CLIPTokenizer()._tokenizer
    for text in texts:
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)):
            words[(*word[:-1], word[-1] + "</w>")] += 1
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged = Counter()
        for word, n in words.items():
            new, at = [], 0
            while at < len(word):
                joined = word[at : at + 2] == best
                new.append("".join(best) if joined else word[at])
                at += 2 if joined else 1
            merged[tuple(new)] += n
        words = merged
    pieces = alphabet + [piece + "</w>" for piece in alphabet] + ["".join(pair) for pair in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}, merges


def dump_captions(folder, texts, max_tokens):
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=max_tokens)
    rows = [[text, ids, sum(mask)] for text, ids, mask in zip(texts, tokens["input_ids"], tokens["attention_mask"])]
    written = {"max_tokens": max_tokens, "rows": rows}
    (folder / "captions.json").write_text(json.dumps(written, ensure_ascii=False, indent=None).replace("], [\"", "],\n[\"") + "\n")


def dump_tokenizers(root, texts, max_tokens=77, merges=120):
    vocab, merges = train(texts, merges)
    # The two forms in which the encoders' tokenizers are published: SD 1.5's files, and what transformers 5 writes, with OpenCLIP's
    # padding token.
    old, new = root / "clip-tokenizer-l", root / "clip-tokenizer-g"
    for folder in (old, new):
        folder.mkdir(parents=True, exist_ok=True)
    token = lambda content: {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    typed = lambda content: {"__type": "AddedToken", **token(content)}
    start, end = "<|startoftext|>", "<|endoftext|>"
    config = {
        "add_prefix_space": False, "bos_token": typed(start), "do_lower_case": True, "eos_token": typed(end), "errors": "replace",
        "model_max_length": 77, "pad_token": end, "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer", "unk_token": typed(end),
    }
    special = {"bos_token": token(start), "eos_token": token(end), "pad_token": end, "unk_token": token(end)}
    (old / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (old / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (old / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (old / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    dump_captions(old, texts, max_tokens)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, pad_token="!", model_max_length=77)
    tokenizer.save_pretrained(new)
    file = new / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False) + "\n")
    dump_captions(new, texts, max_tokens)


def main():
    root = Path(sys.argv[1])
    for name, (kind, config) in CLIPS.items():
        torch.manual_seed(1)
        (root / name).mkdir(parents=True, exist_ok=True)
        dump_clip(root / name, kind, config)
    dump_tokenizers(root, CAPTIONS)


if __name__ == "__main__":
    main()
