"""OpenAI's embeddings: texts as vectors of the model's last hidden states."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from slimrt.errors import SlimrtError
from slimrt.llm import LLM
from slimrt.server.errors import ApiError
from slimrt.server.fields import Field, checked
from slimrt.server.generation import INTEGER, STRING, TEXTS

__all__ = ["EMBEDDINGS", "embeddings"]

_MOST_INPUTS = 2048
EMBEDDINGS: dict[str, Field] = {
    "model": Field(STRING, "any name: there is one model"),
    "input": Field(("string", "array"), "a text, token ids, or a list of either", required=True, inside=TEXTS),
    "encoding_format": Field(STRING, "how vectors are written", "float", choices=("float", "base64")),
    "dimensions": Field(INTEGER, "not supported: the model's width", None, 1, 1 << 31),
    "pooling": Field(STRING, "how a text's tokens become one vector", "mean", choices=("mean", "last", "cls")),
    "user": Field(STRING, "accepted, without effect"),
}


def embeddings(llm: LLM, data: Any) -> dict[str, Any]:
    """What /v1/embeddings answers. Raises ApiError."""
    values = checked(EMBEDDINGS, data)
    if values["dimensions"] not in (None, llm.config.d_model):
        raise ApiError(
            400, f"'dimensions' is {values['dimensions']}; this model has {llm.config.d_model}", param="dimensions"
        )
    given = values["input"]
    many = isinstance(given, list) and given and all(isinstance(one, list | str) for one in given)
    inputs = given if many else [given]
    if len(inputs) > _MOST_INPUTS:
        raise ApiError(400, f"'input' has {len(inputs)} texts; at most {_MOST_INPUTS} at a time", param="input")
    try:
        ids = [llm.token_ids(one) for one in inputs]
        vectors = llm.embed(ids, pooling=values["pooling"])
    except SlimrtError as error:
        raise ApiError(400, f"'input': {error}", param="input") from None
    count = sum(map(len, ids))
    return {
        "object": "list",
        "model": llm.config.name,
        "data": [
            {"object": "embedding", "index": index, "embedding": _written(vector, values["encoding_format"])}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


def _written(vector: np.ndarray, form: str) -> Any:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()
