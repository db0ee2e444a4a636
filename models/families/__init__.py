"""The families that slimrt runs, one short file each."""

from slimrt.models.architecture import Architecture
from slimrt.models.families.cohere import COHERE2, COMMAND_R
from slimrt.models.families.exaone import EXAONE
from slimrt.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from slimrt.models.families.gpt_oss import GPT_OSS
from slimrt.models.families.granite import GRANITE
from slimrt.models.families.internlm2 import INTERNLM2
from slimrt.models.families.llama import LLAMA, MISTRAL3
from slimrt.models.families.olmo2 import OLMO2
from slimrt.models.families.phi3 import PHI3
from slimrt.models.families.qwen import QWEN2, QWEN3, QWEN3MOE
from slimrt.models.families.smollm3 import SMOLLM3

__all__ = ["ARCHITECTURES"]

ARCHITECTURES: dict[str, Architecture] = {
    family.name: family
    for family in (
        LLAMA, QWEN2, QWEN3, QWEN3MOE, SMOLLM3, GRANITE, PHI3, OLMO2, GEMMA, GEMMA2, GEMMA3, COMMAND_R, COHERE2,
        EXAONE, INTERNLM2, GPT_OSS, MISTRAL3,
    )
}  # fmt: skip
