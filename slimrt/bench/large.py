"""How a large model would run, from a few layers of its shape: ``python -m slimrt.bench.large --length 2048``.

Two models of random Q4_K weights, with LLaMA 3 8B's layers (width 4096, feed-forward 14336, 32 heads, 8 of them for
keys and values) but only one and three of them, and the default model's tokenizer. The time of a layer is half the
difference of the two; what a model of 32 layers would take is the time of one layer's model and 31 layers more. That is
an estimate, printed as one, beside what was measured.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from slimrt.bench.ttft import BenchResult, run
from slimrt.hub.store import default_model_path
from slimrt.weights.gguf import GGUFFile

__all__ = ["estimate", "write_shape"]

LAYERS = 32
FEW, MORE = 1, 3
_KIND = GGMLQuantizationType.Q4_K
_WIDTH, _INNER, _HEADS, _KV_HEADS = 4096, 14336, 32, 8


def write_shape(path: Path, layers: int) -> None:
    """A model of ``layers`` layers; random blocks with small scales, so that nothing overflows."""
    rng = np.random.default_rng(0)
    default = GGUFFile(default_model_path())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(1 << 17)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_rope_freq_base(500000.0)
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

    def matrix(name: str, rows: int, columns: int) -> None:
        elements, size = GGML_QUANT_SIZES[_KIND]
        blocks = rng.integers(0, 256, (rows, columns // elements, size), np.uint8)
        scale = np.float16(
            1 / (300 * np.sqrt(columns))
        )  # 6-bit scales times 4-bit weights: deviation 1 / sqrt(columns)
        blocks[:, :, :2] = np.frombuffer(scale.tobytes(), np.uint8)
        blocks[:, :, 2:4] = np.frombuffer(np.float16(7.5 * scale).tobytes(), np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=_KIND)

    ones, kv = np.ones(_WIDTH, np.float32), _WIDTH // _HEADS * _KV_HEADS
    matrix("token_embd.weight", default.tensors["token_embd.weight"].shape[0], _WIDTH)
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
        for name, rows, columns in (
            ("attn_q", _WIDTH, _WIDTH), ("attn_k", kv, _WIDTH), ("attn_v", kv, _WIDTH), ("attn_output", _WIDTH, _WIDTH),
            ("ffn_gate", _INNER, _WIDTH), ("ffn_up", _INNER, _WIDTH), ("ffn_down", _WIDTH, _INNER),
        ):  # fmt: skip
            matrix(f"blk.{layer}.{name}.weight", rows, columns)
    writer.add_tensor("output_norm.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def estimate(few: float, more: float) -> float:
    """Seconds of LAYERS layers from those of FEW and of MORE."""
    return few + (LAYERS - FEW) * (more - few) / (MORE - FEW)


def _report(length: int, few: BenchResult, more: BenchResult) -> list[str]:
    lines = [
        f"LLaMA 3 8B's shape in Q4_K, a prompt of {length} tokens; ~: estimated from the difference of the two",
        f"{'':16}{f'TTFT s, {FEW} and {MORE} layers':28}{f'{LAYERS} layers':12}{'decode ms':16}{LAYERS} layers",
    ]
    for one, other in zip(few.rows, more.rows, strict=True):
        decode = [1 / row.decode_tok_s for row in (one, other)]
        measured = f"{one.ttft_s:.2f}, {other.ttft_s:.2f}"
        whole = f"~{estimate(one.ttft_s, other.ttft_s):.1f} s"
        steps = f"{decode[0] * 1e3:.1f}, {decode[1] * 1e3:.1f}"
        rate = f"~{1 / estimate(decode[0], decode[1]):.1f} tokens/s"
        lines.append(f"{one.contender:16}{measured:28}{whole:12}{steps:16}{rate}")
    return lines


@click.command()
@click.option("--length", default=2048, show_default=True, help="Tokens of the prompt.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--threads", "-t", type=click.IntRange(1))
@click.option("--vs", multiple=True, metavar="llama_cpp")
def main(length: int, repeats: int, threads: int | None, vs: tuple[str, ...]) -> None:
    """Measure, and print what was measured and what it means for 32 layers."""
    results = []
    with tempfile.TemporaryDirectory(prefix="slimrt-bench-") as folder:
        for layers in (FEW, MORE):
            path = Path(folder) / f"{layers}.gguf"
            write_shape(path, layers)
            results.append(run(path, (length,), repeats, ("off",), vs, threads, 16))
            path.unlink()
    click.echo("\n".join(_report(length, results[0], results[1])))


if __name__ == "__main__":
    main()
