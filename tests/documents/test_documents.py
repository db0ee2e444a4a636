"""Text of PDF, Word and HTML, read in a process of its own; what cannot be read says so in one line."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pypdf
import pytest

import slimrt.documents.extract as extract_module
from slimrt.batch import lines
from slimrt.batch.lines import Rows
from slimrt.documents import DOCX, HTML, PDF, document_text, kind_of
from slimrt.errors import SettingError
from slimrt.terminal.text_input import read_document


def pdf(*pages: str) -> bytes:
    """A PDF of one line a page, written by hand after ISO 32000-1, 7.5."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * at} 0 R" for at in range(len(pages)))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for at, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * at} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    raw, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(raw))
        raw += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = (
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\n"
    )
    return raw + f"{end}startxref\n{len(raw)}\n%%EOF\n".encode()


def encrypted(raw: bytes, password: str) -> bytes:
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(raw))
    writer.encrypt(password, algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def docx(body: str) -> bytes:
    """A Word file with the ``body`` of its document, after ECMA-376."""
    out = io.BytesIO()
    relations = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "[Content_Types].xml",
            '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"><Override '
            'PartName="/word/document.xml" ContentType="application/vnd.openxmlformats-officedocument.'
            'wordprocessingml.document.main+xml"/></Types>',
        )
        archive.writestr(
            "_rels/.rels",
            '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
            f'<Relationship Id="r" Type="{relations}" Target="word/document.xml"/></Relationships>',
        )
        archive.writestr("word/document.xml", f'<w:document xmlns:w="{W}"><w:body>{body}</w:body></w:document>')
    return out.getvalue()


def paragraph(text: str, style: str = "") -> str:
    kind = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    return f"<w:p>{kind}<w:r><w:t>{text}</w:t></w:r></w:p>"


def test_a_pdf_is_read_page_by_page() -> None:
    assert document_text(pdf("First page.", "", "Third page."), "report.pdf") == "First page.\n\nThird page."
    # Encrypted under an empty password: nothing is asked of who opens it.
    assert document_text(encrypted(pdf("Not for print."), ""), "x.pdf") == "Not for print."


def test_word_keeps_its_headings_and_tables() -> None:
    cells = "".join(f"<w:tr><w:tc>{paragraph(a)}</w:tc><w:tc>{paragraph(b)}</w:tc></w:tr>" for a, b in ["ab", "cd"])
    raw = docx(paragraph("Harvest", "Heading1") + paragraph("Apples &amp; pears") + f"<w:tbl>{cells}</w:tbl>")
    text = document_text(raw, "report.docx")
    assert text.startswith("# Harvest\n\nApples & pears")
    assert "a | b" in text.replace("  ", " ") and "c | d" in text.replace("  ", " ")


def test_html_is_what_one_reads_of_it() -> None:
    page = """<!doctype html><html><head><meta charset="iso-8859-1"><title>No</title><style>p {}</style></head><body>
      <script>let secret = 1</script><h2>Caf\xe9</h2><p>One <b>bold</b> word and a <a href="http://x.example/">link</a>.</p>
      <ul><li>first</li><li>second</li></ul></body></html>""".encode("latin-1")
    text = document_text(page, "page.html")
    assert text == "## Café\n\nOne **bold** word and a [link](http://x.example/).\n\n- first\n- second"
    assert document_text(b"<p>as it stands</p>", "page.txt") == "<p>as it stands</p>"


@pytest.mark.parametrize(
    ("raw", "name", "told"),
    [
        (encrypted(pdf("secret"), "key"), "a.pdf", r"a\.pdf: is encrypted; .*qpdf --decrypt"),
        (pdf("", ""), "scan.pdf", "without any text on its 2 pages.*ocrmypdf"),
        (b"%PDF-1.7\n\xe2\xe3 and nothing more", "b.pdf", r"b\.pdf: (is a damaged PDF|cannot be read).*; "),
        (docx("")[:-40], "c.docx", "c.docx: is a zip archive"),
        (docx("<w:p>"), "d.docx", "d.docx: cannot be read.*pandoc"),
        (docx(""), "e.docx", "e.docx: has no text in it"),
        (b"<html><script>1</script></html>", "f.HTM", "f.HTM: has no text in it"),
        (b"<div>" * 20_000, "deep.html", "deep.html: (takes more|cannot be read)"),
    ],
)
def test_what_cannot_be_read_says_so_in_one_line(raw: bytes, name: str, told: str) -> None:
    with pytest.raises(SettingError, match=told) as caught:
        document_text(raw, name)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_document_cannot_take_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Word file of some kilobytes whose text takes more memory than the process may have."""
    bomb = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(docx(""))) as good, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in good.namelist():
            if name != "word/document.xml":
                archive.writestr(name, good.read(name))
        with archive.open("word/document.xml", "w", force_zip64=True) as part:
            part.write(f'<w:document xmlns:w="{W}"><w:body>'.encode())
            for _ in range(4):
                part.write(b"<w:p/>" * (1 << 20))
    monkeypatch.setattr(extract_module, "_MEMORY", 120 << 20)
    with pytest.raises(SettingError, match=r"takes more .*than any document should"):
        document_text(bomb.getvalue(), "bomb.docx")
    with pytest.raises(SettingError, match="more than 1 KiB of text"):
        document_text(pdf("a" * 3000), "long.pdf", most=1024)


def test_kinds_and_files(tmp_path: Path) -> None:
    assert [kind_of(pdf("x"), ""), kind_of(docx(""), ""), kind_of(b"<p>", "a.html"), kind_of(b"<p>", "a.md")] == [
        PDF, DOCX, HTML, None,
    ]  # fmt: skip
    path = tmp_path / "report.pdf"
    path.write_bytes(pdf("What the report says.") + b"%" * 5000)
    assert read_document(path, limit=100) == "What the report says."  # the file is larger than its text may be


def test_without_the_extra_one_line_says_what_to_install() -> None:
    code = (
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        "from slimrt.documents.extract import document_text\n"
        "try: document_text(b'%PDF-1.4', 'a.pdf')\nexcept ValueError as error: print(error)"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert "a.pdf: is a PDF, which slimrt[documents] reads (without it pypdf is missing): pip install" in done.stdout, (
        done
    )


def test_rows_on_one_document_read_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rows = tmp_path / "report.pdf", Rows("What?", tmp_path, file_column="path")
    path.write_bytes(pdf("First."))
    read: list[str] = []
    monkeypatch.setattr(lines, "document_text", lambda raw, name: (read.append(name), document_text(raw, name))[1])
    first, again = (rows.request({"path": "report.pdf"})["messages"][0]["content"] for _ in range(2))
    assert first == again == "First.\n\nWhat?" and len(read) == 1
    path.write_bytes(pdf("Now second."))
    assert rows.request({"path": "report.pdf"})["messages"][0]["content"].startswith("Now second.")
