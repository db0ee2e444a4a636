"""Byte-pair encoding of characters (Gemma 4, Sarvam): entries written as they are, a low line for a space.

What SentencePiece vocabularies become when a merges list takes the place of scores. A character that the vocabulary
lacks is written as its UTF-8 bytes, by the entries <0x00> to <0xFF>.
"""

from __future__ import annotations

from slimrt.text.bpe import ListMerger, parse_merges, pre_tokenizer
from slimrt.text.vocab import Vocabulary

__all__ = ["RawBPE"]

_SPACE = "\u2581"


class RawBPE:
    """Text to ids and ids to bytes where ``tokenizer.ggml.pre`` names a rule for entries written as they are.

    Raises ModelFileError for an unknown pre-tokenizer or a merges list that does not fit the vocabulary.
    """

    def __init__(self, vocab: Vocabulary) -> None:
        self._vocab = vocab
        self._pre = pre_tokenizer(vocab)
        self._merger = ListMerger(parse_merges(vocab, []))
        self._bytes = [vocab.ids.get(f"<0x{byte:02X}>") for byte in range(256)]

    @property
    def add_bos(self) -> bool:
        """Whether BOS is put in front where the metadata does not say."""
        return self._pre.add_bos

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, which holds no control tokens; bytes without an entry are left out, as in llama.cpp."""
        ids: list[int] = []
        entry = self._vocab.ids.get
        for piece in self._pre.split(text.replace(" ", _SPACE)):
            line_ends = entry(piece) if not piece.strip("\n") else None
            if line_ends is not None:
                ids.append(line_ends)
                continue
            # What has no entry takes part as a number that no merge names.
            for id in self._merger.merge([entry(char, -1 - ord(char)) for char in piece]):
                if id >= 0:
                    ids.append(id)
                else:
                    found = map(self._bytes.__getitem__, chr(-1 - id).encode())
                    ids += [byte for byte in found if byte is not None]
        return ids

    def token_bytes(self, id: int) -> bytes:
        """The bytes that token ``id`` stands for."""
        plain = self._vocab.plain_bytes(id)
        return self._vocab.tokens[id].replace(_SPACE, " ").encode() if plain is None else plain
