"""How a large model would run, from a few layers of its shape: ``python -m slimrt.bench.large --length 2048``.

Two models of random Q4_K weights with the layers of a well-known one (``--shape``), but only one and three of them, and
the default model's tokenizer. The time of a layer is half the difference of the two; what the whole model would take is
the time of one layer's model and that of the other layers more. That is an estimate, printed as one, beside what was
measured.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from slimrt.bench.ttft import BenchResult, run
from slimrt.hub.store import default_model_path
from slimrt.models import ARCHITECTURES
from slimrt.weights.gguf import GGUFFile

__all__ = ["SHAPES", "Shape", "estimate", "write_shape"]

FEW, MORE = 1, 3
_KIND = GGMLQuantizationType.Q4_K


@dataclass(frozen=True)
class Shape:
    """The layers of a model: ``inner`` is the width of the feed-forward, or of each of ``experts``, ``used`` of which a
    token passes."""

    title: str
    arch: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_width: int = 128
    experts: int = 0
    used: int = 0


SHAPES = {
    "llama-3-8b": Shape("LLaMA 3 8B", "llama", 32, 4096, 14336, 32, 8),
    "qwen3-8b": Shape("Qwen3 8B", "qwen3", 36, 4096, 12288, 32, 8),
    "qwen3-30b-a3b": Shape("Qwen3 30B-A3B", "qwen3moe", 48, 2048, 768, 32, 4, experts=128, used=8),
}


def write_shape(path: Path, layers: int, shape: Shape) -> None:
    """A model of ``layers`` layers; random blocks with small scales, so that nothing overflows."""
    rng = np.random.default_rng(0)
    default = GGUFFile(default_model_path())
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_block_count(layers)
    writer.add_context_length(1 << 17)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(500000.0)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.used)
        writer.add_expert_feed_forward_length(shape.inner)
    for key, value in default.metadata.items():
        if key.startswith("tokenizer.ggml."):
            if isinstance(value, (list, np.ndarray)):
                writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_key_value(key, value, GGUFValueType.UINT32)
            else:
                writer.add_string(key, str(value))

    def matrix(name: str, *sizes: int) -> None:
        elements, size = GGML_QUANT_SIZES[_KIND]
        rows, columns = math.prod(sizes[:-1]), sizes[-1]
        blocks = rng.integers(0, 256, (rows, columns // elements, size), np.uint8)
        scale = np.float16(
            1 / (300 * np.sqrt(columns))
        )  # 6-bit scales times 4-bit weights: deviation 1 / sqrt(columns)
        blocks[:, :, :2] = np.frombuffer(scale.tobytes(), np.uint8)
        blocks[:, :, 2:4] = np.frombuffer(np.float16(7.5 * scale).tobytes(), np.uint8)
        writer.add_tensor(name, blocks.reshape(*sizes[:-1], -1), raw_dtype=_KIND)

    def vector(name: str, size: int) -> None:
        writer.add_tensor(name, np.ones(size, np.float32))

    d, q, kv = shape.width, shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    matrix("token_embd.weight", default.tensors["token_embd.weight"].shape[0], d)
    for layer in range(layers):
        blk = f"blk.{layer}"
        vector(f"{blk}.attn_norm.weight", d)
        vector(f"{blk}.ffn_norm.weight", d)
        if ARCHITECTURES[shape.arch].qk_norm == "head":
            vector(f"{blk}.attn_q_norm.weight", shape.head_width)
            vector(f"{blk}.attn_k_norm.weight", shape.head_width)
        for name, rows, columns in (("attn_q", q, d), ("attn_k", kv, d), ("attn_v", kv, d), ("attn_output", d, q)):
            matrix(f"{blk}.{name}.weight", rows, columns)
        if shape.experts:
            router = (rng.standard_normal((shape.experts, d)) / np.sqrt(d)).astype(np.float32)
            writer.add_tensor(f"{blk}.ffn_gate_inp.weight", router)
        stacked, end = ((shape.experts,), "_exps") if shape.experts else ((), "")
        for name, rows, columns in (
            ("ffn_gate", shape.inner, d),
            ("ffn_up", shape.inner, d),
            ("ffn_down", d, shape.inner),
        ):
            matrix(f"{blk}.{name}{end}.weight", *stacked, rows, columns)
    vector("output_norm.weight", d)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def estimate(few: float, more: float, layers: int) -> float:
    """Seconds of ``layers`` layers from those of FEW and of MORE."""
    return few + (layers - FEW) * (more - few) / (MORE - FEW)


def _report(shape: Shape, length: int, few: BenchResult, more: BenchResult) -> list[str]:
    whole_model = f"{shape.layers} layers"
    lines = [
        f"{shape.title}'s shape in Q4_K, a prompt of {length} tokens; ~: estimated from the difference of the two",
        f"{'':16}{f'TTFT s, {FEW} and {MORE} layers':28}{whole_model:12}{'decode ms':16}{whole_model}",
    ]
    for one, other in zip(few.rows, more.rows, strict=True):
        decode = [1 / row.decode_tok_s for row in (one, other)]
        measured = f"{one.ttft_s:.2f}, {other.ttft_s:.2f}"
        whole = f"~{estimate(one.ttft_s, other.ttft_s, shape.layers):.1f} s"
        steps = f"{decode[0] * 1e3:.1f}, {decode[1] * 1e3:.1f}"
        rate = f"~{1 / estimate(decode[0], decode[1], shape.layers):.1f} tokens/s"
        lines.append(f"{one.contender:16}{measured:28}{whole:12}{steps:16}{rate}")
    return lines


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="llama-3-8b", show_default=True)
@click.option("--length", default=2048, show_default=True, help="Tokens of the prompt.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--threads", "-t", type=click.IntRange(1))
@click.option("--vs", multiple=True, metavar="llama_cpp")
def main(shape: str, length: int, repeats: int, threads: int | None, vs: tuple[str, ...]) -> None:
    """Measure, and print what was measured and what it means for the whole model."""
    results = []
    with tempfile.TemporaryDirectory(prefix="slimrt-bench-") as folder:
        for layers in (FEW, MORE):
            path = Path(folder) / f"{layers}.gguf"
            write_shape(path, layers, SHAPES[shape])
            results.append(run(path, (length,), repeats, ("off",), vs, threads, 16))
            path.unlink()
    click.echo("\n".join(_report(SHAPES[shape], length, results[0], results[1])))


if __name__ == "__main__":
    main()
