"""Tiny random checkpoints and what Transformers computes with them.

Command (in an environment with torch 2.13.0, transformers 4.57.1, tokenizers 0.22.2, safetensors 0.8.0,
sentencepiece 0.2.3, numpy): ``python make_checkpoints.py``. It writes, beside itself,

* ``hf-*/``: Hugging Face folders as ``save_pretrained`` writes them;
* ``meta-*/``: folders in Meta's original format, saved by ``torch.save``;
* ``expected.npz``: for each folder, ``<folder>/ids<i>`` and the last token's logits as Transformers computes them in
  float64 (``/logits<i>``) and in float32 (``/logits32_<i>``) from the same stored weights;
* ``expected.json``: for each folder, texts and their token ids by Hugging Face's tokenizers, SentencePiece
  or tiktoken.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import sentencepiece
import tiktoken
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

HERE = Path(__file__).parent
V = 384
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
CORPUS = [
    "The quick brown fox jumps over the lazy dog. I've told them that they'll need 1234567 of these things.",
    "Es war einmal ein kleiner König, der hatte drei Söhne; the other one went there, and then another.",
    "def main(argument):\n    return [number for number in range(100) if number % 3 == 0]\n\n\tprint('done')",
    "Быстрая лиса прыгает через ленивую собаку. 素早い茶色の狐。 It's over there, isn't it?  Two  spaces.",
] * 4
TEXTS = [
    "The other fox went over there",
    "I've told 12345 dogs,  they'LL need\n\n\tmore: König!",
    " leading and trailing ",
    "Быстрая 狐 🦊 naïve",
    "",
]


def byte_level_bpe(steps: list, ignore_merges: bool, bos: str | None, eos: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in (bos, eos, "<|im_end|>") if token]
    trainer = trainers.BpeTrainer(
        vocab_size=V - 5, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(["<tool call>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def split(regex: str) -> list:
    return [
        pre_tokenizers.Split(Regex(regex), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


TOKENIZERS = {
    "llama-bpe": lambda: byte_level_bpe(split(LLAMA3), True, "<|begin_of_text|>", "<|end_of_text|>"),
    "qwen2": lambda: byte_level_bpe(split(QWEN2), False, None, "<|endoftext|>"),
    "gpt-2": lambda: byte_level_bpe([pre_tokenizers.ByteLevel(add_prefix_space=False)], False, None, "<|endoftext|>"),
    "smollm": lambda: byte_level_bpe(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        False,
        None,
        "<|endoftext|>",
    ),
}


def train_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    corpus = path.with_suffix(".txt")
    corpus.write_text("\n".join(line.replace("\n", " ") for line in CORPUS[:3]))
    with contextlib.chdir(path.parent):  # the model records the names that it was trained with
        sentencepiece.SentencePieceTrainer.Train(
            input=corpus.name, model_prefix=path.stem, model_type="bpe", vocab_size=V - 2,
            character_coverage=1.0, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=True,
            remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
        )  # fmt: skip
    corpus.unlink()
    path.with_suffix(".vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def llama_json_from_sentencepiece(processor: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    """The tokenizer.json that Transformers' slow-to-fast conversion gives for LLaMA: all splits of every piece."""
    vocab = {processor.IdToPiece(i): i for i in range(processor.vocab_size())}
    pieces = sorted(
        (p for p, i in vocab.items() if not (processor.IsControl(i) or processor.IsUnknown(i) or processor.IsByte(i))),
        key=lambda p: (-processor.GetScore(vocab[p]), vocab[p]),
    )
    merges = []
    for piece in pieces:
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.25
            parameter.copy_(1 + noise if "norm" in name else noise)


@contextmanager
def float64_everywhere():
    """Transformers' models cast to float32 in norms, RoPE and softmax; a float64 reference must not."""
    saved = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved


def logits(model_class: type, config, state: dict, ids: list[int], double: bool) -> np.ndarray:
    def run(dtype: torch.dtype) -> np.ndarray:
        model = model_class._from_config(config, attn_implementation="eager").to(dtype)
        rotary = model.model.rotary_emb
        inverse, rotary.attention_scaling = rotary.rope_init_fn(config, torch.device("cpu"))
        rotary.register_buffer("inv_freq", inverse, persistent=False)
        model.load_state_dict({name: value.to(dtype) for name, value in state.items()})
        with torch.no_grad():
            return model.eval()(torch.tensor([ids])).logits[0, -1].numpy()

    real_double, real_single = torch.float64, torch.float32
    if not double:
        return run(real_single)
    with float64_everywhere():
        return run(real_double)


def main() -> None:
    for old in (*HERE.glob("hf-*"), *HERE.glob("meta-*")):
        shutil.rmtree(old)
    arrays: dict[str, np.ndarray] = {}
    texts: dict[str, dict] = {}
    common = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    llama3_rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    cases = {
        "hf-llama-gqa": (LlamaForCausalLM, LlamaConfig(**common, rope_theta=500000.0), torch.bfloat16, "llama-bpe"),
        "hf-llama3-rope-tied-shards": (
            LlamaForCausalLM,
            LlamaConfig(
                **common | {"hidden_size": 64}, rope_theta=10000.0, rope_scaling=llama3_rope, tie_word_embeddings=True
            ),
            torch.bfloat16,
            "smollm",
        ),
        "hf-llama-bias-headdim": (
            LlamaForCausalLM,
            LlamaConfig(**common | {"num_key_value_heads": 4}, head_dim=16, attention_bias=True, mlp_bias=True),
            torch.float16,
            "gpt-2",
        ),
        "hf-qwen2": (Qwen2ForCausalLM, Qwen2Config(**common, rope_theta=1000000.0), torch.bfloat16, "qwen2"),
        "hf-mistral": (
            MistralForCausalLM,
            MistralConfig(**common, head_dim=16, sliding_window=None),
            torch.bfloat16,
            "sentencepiece",
        ),
        "hf-llama-linear": (
            LlamaForCausalLM,
            LlamaConfig(**common, rope_scaling={"rope_type": "linear", "factor": 4.0}),
            torch.float32,
            "sentencepiece json",
        ),
        "hf-llama-yarn": (LlamaForCausalLM, LlamaConfig(**common, rope_scaling=yarn), torch.bfloat16, "smollm"),
        "hf-qwen2-yarn-factor": (
            Qwen2ForCausalLM,
            Qwen2Config(**common, rope_scaling=yarn | {"attention_factor": 1.3}, tie_word_embeddings=True),
            torch.bfloat16,
            "qwen2",
        ),
    }
    rng = np.random.default_rng(7)

    def record(name: str, model_class: type, config, state: dict) -> None:
        for i, length in enumerate((1, 13, 60)):
            ids = rng.integers(0, V, length).tolist()
            arrays[f"{name}/ids{i}"] = np.array(ids, np.int32)
            arrays[f"{name}/logits{i}"] = logits(model_class, config, state, ids, double=True)
            arrays[f"{name}/logits32_{i}"] = logits(model_class, config, state, ids, double=False)

    for seed, (name, (model_class, config, dtype, kind)) in enumerate(cases.items()):
        folder = HERE / name
        folder.mkdir()
        model = model_class(config)
        randomise(model, seed)
        model = model.to(dtype)
        model.save_pretrained(folder, max_shard_size="60KB" if "shards" in name else "5GB")
        record(name, model_class, config, model.state_dict())
        if kind.startswith("sentencepiece"):
            processor = train_sentencepiece(folder / "tokenizer.model")
            tokenizer = llama_json_from_sentencepiece(processor)
            (folder / "tokenizer_config.json").write_text(
                json.dumps(
                    {
                        "bos_token": "<s>",
                        "eos_token": "</s>",
                        "unk_token": "<unk>",
                        "add_bos_token": True,
                        "chat_template": TEMPLATE,
                    }
                )
            )
            if kind == "sentencepiece":
                texts[name] = {text: [1, *processor.encode(text)] for text in TEXTS}
            else:
                (folder / "tokenizer.model").unlink()
                tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
                texts[name] = {text: tokenizer.encode(text).ids for text in TEXTS}
        else:
            tokenizer = TOKENIZERS[kind]()
            bos = "<|begin_of_text|>" if kind == "llama-bpe" else None
            eos = "<|end_of_text|>" if bos else "<|endoftext|>"
            fast = PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=TEMPLATE
            )
            fast.save_pretrained(folder)
            texts[name] = {text: tokenizer.encode(text).ids for text in TEXTS}

    for name, n_shards, scaled, dtype in (("meta-one", 1, False, torch.float16), ("meta-two", 2, True, torch.bfloat16)):
        scaling = llama3_rope | {"original_max_position_embeddings": 8192} if scaled else None
        base = 500000.0 if scaled else 10000.0
        config = LlamaConfig(**common | {"rms_norm_eps": 1e-5}, rope_theta=base, rope_scaling=scaling)
        model = LlamaForCausalLM(config)
        randomise(model, 100 + n_shards)
        model = model.to(dtype)
        record(name, LlamaForCausalLM, config, model.state_dict())
        texts[name] = write_meta(HERE / name, model.state_dict(), config, n_shards, scaled)

    np.savez_compressed(HERE / "expected.npz", **arrays)
    (HERE / "expected.json").write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n")


def write_meta(folder: Path, state: dict, config, n_shards: int, llama3: bool) -> dict[str, list[int]]:
    """A folder as Meta publishes them; LLaMA 3 splits the embedding by rows, the earlier ones by columns."""
    weights = folder / "weights" if not llama3 else folder
    weights.mkdir(parents=True)
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(n_shards)]

    def to_meta(weight: torch.Tensor, heads: int) -> torch.Tensor:
        rows, columns = weight.shape
        return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)

    def put(name: str, tensor: torch.Tensor, axis: int | None) -> None:
        slices = [tensor] * n_shards if axis is None else tensor.chunk(n_shards, dim=axis)
        for part, piece in zip(parts, slices, strict=True):
            # Slices by column are stored as they are: a strided view into the whole tensor's storage.
            part[name] = piece if axis == 1 else piece.clone()

    put("tok_embeddings.weight", state["model.embed_tokens.weight"], 0 if llama3 else 1)
    put("norm.weight", state["model.norm.weight"], None)
    put("output.weight", state["lm_head.weight"], 0)
    for layer in range(config.num_hidden_layers):
        source, target = f"model.layers.{layer}.", f"layers.{layer}."
        put(
            f"{target}attention.wq.weight",
            to_meta(state[f"{source}self_attn.q_proj.weight"], config.num_attention_heads),
            0,
        )
        put(
            f"{target}attention.wk.weight",
            to_meta(state[f"{source}self_attn.k_proj.weight"], config.num_key_value_heads),
            0,
        )
        put(f"{target}attention.wv.weight", state[f"{source}self_attn.v_proj.weight"], 0)
        put(f"{target}attention.wo.weight", state[f"{source}self_attn.o_proj.weight"], 1)
        put(f"{target}feed_forward.w1.weight", state[f"{source}mlp.gate_proj.weight"], 0)
        put(f"{target}feed_forward.w2.weight", state[f"{source}mlp.down_proj.weight"], 1)
        put(f"{target}feed_forward.w3.weight", state[f"{source}mlp.up_proj.weight"], 0)
        put(f"{target}attention_norm.weight", state[f"{source}input_layernorm.weight"], None)
        put(f"{target}ffn_norm.weight", state[f"{source}post_attention_layernorm.weight"], None)
    for i, part in enumerate(parts):
        part["rope.freqs"] = torch.zeros(config.head_dim // 2)
        torch.save(part, weights / f"consolidated.{i:02d}.pth")
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5}
    params |= {"vocab_size": V, "rope_theta": 500000.0, "use_scaled_rope": True} if llama3 else {"vocab_size": -1}
    (weights / "params.json").write_text(json.dumps(params))
    if not llama3:
        processor = train_sentencepiece(folder / "tokenizer.model")
        return {text: [1, *processor.encode(text)] for text in TEXTS}
    trained = byte_level_bpe(split(LLAMA3), True, None, "<|x|>")
    letters = {letter: byte for byte, letter in zip(range(256), byte_letters(), strict=True)}
    # Ranks in the order of tiktoken: single bytes, then by merge; 112 merged tokens, 16 control tokens.
    vocab = json.loads(trained.to_str())["model"]["vocab"]
    merged = [bytes(letters[c] for c in text) for text in sorted(vocab, key=vocab.__getitem__) if len(text) > 1][:112]
    ranks = {token: rank for rank, token in enumerate([*(bytes([i]) for i in range(256)), *merged])}
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_text("".join(lines))
    encoding = tiktoken.Encoding("tiny", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={})
    return {text: [len(ranks), *encoding.encode_ordinary(text)] for text in TEXTS}


def byte_letters() -> list[str]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(hidden)) for byte in range(256)]


if __name__ == "__main__":
    main()
