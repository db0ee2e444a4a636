"""The text of files that people have: plain text, PDF, Word and HTML."""

from slimrt.documents.extract import LARGEST, document_text, plain_text
from slimrt.documents.kinds import DOCX, HTML, PDF, Kind, kind_of

__all__ = ["DOCX", "HTML", "LARGEST", "PDF", "Kind", "document_text", "kind_of", "plain_text"]
