"""What Transformers' ``apply_chat_template`` writes for real models' templates.

Made with transformers 5.24, tokenizers 0.23, gguf 0.19 (for the default model's template) from the folder
``models/templates`` of llama.cpp, the default model, and the templates of GGUF files that huggingface.js lists
(``packages/ollama-utils/src/chat-template-automap.ts``):

    python tests/goldens/chat/make_transformers.py TEMPLATES SmolLM2-135M-Instruct.Q4_1.gguf chat-template-automap.ts

writes the templates and ``transformers.json`` beside this script. Other templates of that folder were compared the same
way once, and are left out for their length.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

HERE = Path(__file__).parent
TEMPLATES = {
    "llama-3.2": ("meta-llama-Llama-3.2-3B-Instruct.jinja", "<|begin_of_text|>", "<|eot_id|>"),
    "qwen2.5": ("Qwen-Qwen2.5-7B-Instruct.jinja", "<|endoftext|>", "<|im_end|>"),
    "mistral-nemo": ("mistralai-Mistral-Nemo-Instruct-2407.jinja", "<s>", "</s>"),
    "gemma-2": ("google-gemma-2-2b-it.jinja", "<bos>", "<eos>"),
    "phi-3.5": ("microsoft-Phi-3.5-mini-instruct.jinja", "<s>", "<|endoftext|>"),
    "deepseek-r1": ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja", "<|begin|>", "<|end|>"),
}
LISTED = {
    "gemma-3": ("library/gemma3:270m", "<bos>", "<eos>"),
    "phi-4-mini": ("library/phi4-mini:3.8b", "<|endoftext|>", "<|endoftext|>"),
    "olmo-2": ("library/olmo2:7b", "<|endoftext|>", "<|endoftext|>"),
    "exaone-3.5": ("library/exaone3.5:7.8b", "[BOS]", "[|endofturn|]"),
    "internlm2": ("library/internlm2:1.8b", "<s>", "</s>"),
}
SYSTEM = {"role": "system", "content": "You are  terse.\n"}
USER = {"role": "user", "content": "  Où est la bibliothèque? 図書館 <|im_end|>\n"}
ANSWER = {"role": "assistant", "content": "<think>hm</think> Là-bas. "}
MORE = {"role": "user", "content": "{{ 7 * 7 }} & <b>"}
CONVERSATIONS = [
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER, MORE],
    [SYSTEM, USER, ANSWER, MORE],
    [USER, ANSWER],
    [USER, USER],
    [{"role": "wizard", "content": "x"}],
]
EXTRA = {"date_string": "26 Jul 2024"}


def cases(template: str, bos: str, eos: str) -> list[dict]:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"x": 0}, "x")), bos_token=bos, eos_token=eos
    )
    results = []
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            case = {"messages": messages, "add_generation_prompt": prompt}
            try:
                case["text"] = tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=prompt, **EXTRA
                )
            except Exception as error:
                case["error"] = str(error)
            results.append(case)
    return results


def listed(automap: str, model: str) -> str:
    """The template of ``model`` in a list of objects with ``model: "..."`` and ``gguf: "..."``."""
    entry = automap[automap.index(f'model: "{model}"') :]
    return json.JSONDecoder().raw_decode(entry, entry.index("gguf: ") + len("gguf: "))[0]


def main(folder: Path, model: Path, automap: Path) -> None:
    sources = {name: ((folder / file).read_text(), bos, eos) for name, (file, bos, eos) in TEMPLATES.items()}
    sources |= {name: (listed(automap.read_text(), of), bos, eos) for name, (of, bos, eos) in LISTED.items()}
    field = gguf.GGUFReader(model).fields["tokenizer.chat_template"]
    sources["smollm2"] = (bytes(field.parts[field.data[0]]).decode(), "<|im_start|>", "<|im_end|>")
    golden = {"transformers": transformers.__version__, "extra": EXTRA, "templates": {}}
    for name, (source, bos, eos) in sources.items():
        (HERE / f"{name}.jinja").write_text(source)
        golden["templates"][name] = {"bos": bos, "eos": eos, "cases": cases(source, bos, eos)}
    (HERE / "transformers.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
