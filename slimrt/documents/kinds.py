"""What a file is, by its first bytes and its name."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import PurePath

__all__ = ["DOCX", "HTML", "PDF", "Kind", "kind_of"]


@dataclass(frozen=True)
class Kind:
    """``words``: what to call it. ``reader``: who makes text of it (a name in ``worker.py``), "" for nobody.
    ``command``: what makes text of it where slimrt does not, "" if nothing does."""

    words: str
    reader: str = ""
    command: str = ""


PDF = Kind("a PDF", "pdf", "pdftotext FILE.pdf FILE.txt")
DOCX = Kind("a Word document", "docx", "pandoc FILE.docx -t plain -o FILE.txt")
HTML = Kind("a web page", "html", "pandoc FILE.html -t plain -o FILE.txt")
_ZIP = Kind("a zip archive, as LibreOffice and other Office files are", command="pandoc FILE.odt -t plain -o FILE.txt")

_BEGINS = {
    b"%PDF-": PDF,
    b"PK\x03\x04": _ZIP,
    b"\xd0\xcf\x11\xe0": Kind("an old Office file", command="soffice --convert-to txt FILE.doc"),
    b"{\\rtf": Kind("a rich-text file", command="pandoc FILE.rtf -t plain -o FILE.txt"),
    b"\x89PNG": Kind("a picture"),
    b"\xff\xd8\xff": Kind("a picture"),
    b"GIF8": Kind("a picture"),
    b"GGUF": Kind("a model"),
    b"SLIMRTS\n": Kind("a saved conversation", command="/restore FILE"),
    b"\x1f\x8b": Kind("a compressed file", command="gunzip FILE.gz"),
    b"\x7fELF": Kind("a program"),
    b"SQLite format 3": Kind("a database"),
    b"\xff\xfe": Kind("text in UTF-16", command="iconv -f UTF-16 -t UTF-8 FILE"),
    b"\xfe\xff": Kind("text in UTF-16", command="iconv -f UTF-16 -t UTF-8 FILE"),
}
_PAGES = (".html", ".htm", ".xhtml")


def kind_of(raw: bytes, name: str) -> Kind | None:
    """What the file ``name`` is that holds ``raw``; None: nothing known, so text.

    Only a file whose name says so is a web page: what is piped in, or has another name, is read as it stands.
    """
    kind = next((kind for begin, kind in _BEGINS.items() if raw.startswith(begin)), None)
    if kind is _ZIP and _has(raw, "word/document.xml"):
        return DOCX
    if kind is None and PurePath(name).suffix.lower() in _PAGES:
        return HTML
    return kind


def _has(raw: bytes, member: str) -> bool:
    """Whether the zip archive ``raw`` has a file of that name. Only its directory is read."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            return member in archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return False
