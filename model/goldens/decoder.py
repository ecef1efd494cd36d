"""Dumps the goldens of decoders, of averaged layers and of decoders' tokenizers, from transformers.

    python model/goldens/decoder.py model/tests/goldens

Needs torch 2.11 and transformers 5, and the goldens of text.py and clip.py. The tests read only what is checked in; run this again
when a golden must change. Each decoder is a folder: what save_pretrained writes, inputs-N.safetensors and outputs-N.safetensors;
`features` in the outputs is the layer-normalized average, which the T5 and CLIP goldens get as average*.safetensors. Each
tokenizer is a folder with captions.json: texts with their ids.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaTokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM, T5Config, T5EncoderModel

SIZES = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, max_position_embeddings=64)

# Grouped queries and one head of keys each; biases; an untied, a tied and no head; each form of rotary settings.
DECODERS = {
    "llama-gqa": (LlamaForCausalLM, LlamaConfig(**SIZES, num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=1e-5)),
    "llama-mha": (LlamaForCausalLM, LlamaConfig(**SIZES, num_attention_heads=3, tie_word_embeddings=True, rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4})),
    "llama3": (LlamaModel, LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1, attention_bias=True, mlp_bias=True, rope_parameters={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 5e5})),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=10, rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
}

# Tokens and own lengths of each row; rows are padded on the right.
SHAPES = [(37, [37, 20, 5, 1]), (8, [8, 8]), (1, [1])]

CAPTIONS = [
    "a red circle left of a blue square",
    "A  Small\tRED square,\n\nabove two green circles!!",
    "the dog's ball isn't what they'd've called it; we'll SEE, I'M sure you're right",
    "123 apples & 4.5% of №7 … “quoted” — ½ ²",
    "1234567890 12,345,678.90",
    "Ünïcödé straße ΣΑΣ İstanbul ﬁne cafe\u0301 café",
    "漢字とかな 🦊🦊 \U0001f469\u200d\U0001f680 שלום",
    "<s>a dog</s> and <unk> a <0x0A> cat<|endoftext|>!",
    "<|im_start|>user\na dog<|im_end|>\n",
    "   ",
    " ",
    "",
    "\n",
    " leading and trailing ",
    "  two  spaces   three    four",
    "▁a literal▁block ▁",
    "hello!world ! !! ?! a!b",
    "it 's 'S ''s don't DON'T",
    "zero\u200bwidth\u00a0nbsp\u3000wide \u0085 next",
    "tab\tand\r\nreturn\rand\n\n\nlines",
    "\x00\x01\x7f control",
    "ａ fullwidth Ａ",
    "e\u0301 \u00e9 \u1e9b\u0323",
    "한국어 조선말",
    "हिन्दी में",
    "snake_case camelCase kebab-case",
    "https://example.org/a?b=c&d=%20#e",
    "((nested [brackets] {here}))",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "a" * 50,
    " ".join(["a very long caption of a red square and a blue circle"] * 9),
]


def randomize(model, spread=0.5):
    """Random values everywhere, so that no parameter is without effect; not so large that rounding to bfloat16 grows from layer to layer."""
    for name, parameter in model.named_parameters():
        width = parameter.shape[-1] if parameter.dim() > 1 else 4
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=spread * width**-0.5)


def average(out):
    """The layer-normalized average: every block's output, of the last one the network's own."""
    states = [*out.hidden_states[1:-1], out.last_hidden_state]
    return sum(nn.functional.layer_norm(state.float(), state.shape[-1:]) for state in states) / len(states)


def dump_decoder(folder, kind, config):
    config._attn_implementation = "eager"
    model = kind(config).eval()
    randomize(model)
    model.save_pretrained(folder)
    for at, (tokens, lengths) in enumerate(SHAPES):
        mask = (torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(3, SIZES["vocab_size"], mask.shape) * mask
        with torch.no_grad():
            out = getattr(model, "model", model)(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        save_file({"input_ids": ids, "attention_mask": mask}, folder / f"inputs-{at}.safetensors")
        save_file({"features": average(out).contiguous(), "last_hidden_state": out.last_hidden_state.contiguous()}, folder / f"outputs-{at}.safetensors")


def old_form(folder):
    """The configuration as transformers 4 wrote it."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype"), "sliding_window": 32}
    config.pop("layer_types")
    file.write_text(json.dumps(config, indent=2) + "\n")


def dump_averages(root):
    for name in ("t5-gated", "t5-relu", "clip-l", "clip-g"):
        kind = T5EncoderModel if name.startswith("t5") else CLIPTextModelWithProjection if name == "clip-g" else CLIPTextModel
        model = kind.from_pretrained(root / name).eval()
        for inputs in sorted((root / name).glob("inputs*.safetensors")):
            with torch.no_grad():
                out = model(**load_file(inputs), output_hidden_states=True)
            save_file({"features": average(out).contiguous()}, root / name / inputs.name.replace("inputs", "average"))


def dump_overflow(folder):
    """A T5 that is float16 throughout and overflows: in a feed-forward layer, and in the sum after it. Its activations are clamped."""
    folder.mkdir(exist_ok=True)
    model = T5EncoderModel(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=3, num_heads=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False)).eval()
    randomize(model, 1.0)
    with torch.no_grad():
        inner = model.encoder.block[1].layer[1].DenseReluDense
        inner.wo.weight *= 5_000
        inner.wi_1.weight *= 30
    model.save_pretrained(folder)
    model = model.to(torch.float16)
    ids = torch.randint(2, 20, (2, 6))
    mask = torch.ones_like(ids)
    inside = []
    inner.register_forward_hook(lambda module, args, output: inside.append(output))
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert inside[0].isinf().any() and not inside[0].isnan().any() and states.isfinite().all()
    save_file({"input_ids": ids, "attention_mask": mask}, folder / "inputs.safetensors")
    save_file({"last_hidden_state": states.contiguous()}, folder / "outputs.safetensors")


def train(tokenizer, size):
    """Pieces and merges of a byte-pair model over the plain captions: the others' characters have no piece of their own."""
    tokenizer.train_from_iterator([text for text in CAPTIONS if text.isascii()], BpeTrainer(vocab_size=size, show_progress=False, max_token_length=12))
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(merge) for merge in model["merges"]]


def llama(legacy):
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    sample = Tokenizer(BPE())
    sample.normalizer, sample.pre_tokenizer = spaces, pre_tokenizers.Metaspace(prepend_scheme="never")
    pieces, merges = train(sample, 200)
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    vocab = {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = spaces
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def qwen():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), byte_level])
    sample = Tokenizer(BPE())
    sample.normalizer, sample.pre_tokenizer = normalizers.NFC(), split
    pieces, merges = train(sample, 200)
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + pieces
    vocab = {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), split
    tokenizer.post_processor, tokenizer.decoder = processors.ByteLevel(trim_offsets=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def dump_tokenizer(folder, tokenizer, config, kind, max_tokens=48):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str() + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    reader = kind.from_pretrained(folder)
    if reader.pad_token is None:
        reader.pad_token = reader.eos_token
    tokens = reader(CAPTIONS, padding="max_length", padding_side="right", truncation=True, max_length=max_tokens)
    rows = [[text, ids, sum(mask)] for text, ids, mask in zip(CAPTIONS, tokens["input_ids"], tokens["attention_mask"])]
    written = {"max_tokens": max_tokens, "rows": rows}
    (folder / "captions.json").write_text(json.dumps(written, ensure_ascii=True, indent=None).replace("], [\"", "],\n[\"") + "\n")


def main():
    root = Path(sys.argv[1])
    for name, (kind, config) in DECODERS.items():
        torch.manual_seed(1)
        (root / name).mkdir(parents=True, exist_ok=True)
        dump_decoder(root / name, kind, config)
    old_form(root / "qwen2")
    dump_averages(root)
    torch.manual_seed(1)
    dump_overflow(root / "t5-overflow")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
    dump_tokenizer(root / "llama-tokenizer", llama(True), special, PreTrainedTokenizerFast)
    dump_tokenizer(root / "llama-tokenizer-new", llama(False), special | {"pad_token": "<unk>"}, LlamaTokenizer)
    named = {"add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    dump_tokenizer(root / "qwen-tokenizer", qwen(), named | {"tokenizer_class": "Qwen2Tokenizer"}, Qwen2Tokenizer)


if __name__ == "__main__":
    main()
