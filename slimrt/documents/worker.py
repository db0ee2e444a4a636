"""The process in which a document becomes text; ``extract`` starts it, one for each document.

A file comes from anybody, and readers of PDF and Word are large programs: whatever a file does to them, memory and
processor time of this process are bounded, and nothing but text or a sentence leaves it.

The document comes on stdin, its text goes to stdout in UTF-8. The process ends with a status: 0, or PROBLEM and on
stdout a sentence, or MISSING and on stdout the name of a package.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable

PER_BYTE = 16  # bytes of memory for each of the document
SECONDS = 60  # of processor time
PROBLEM, MISSING = 3, 4  # statuses


class ProblemError(Exception):
    """What is the matter with the document, as the end of a sentence that begins with its name."""


def _pdf(raw: bytes) -> str:
    import pypdf
    from pypdf.errors import PdfReadError

    try:
        reader = pypdf.PdfReader(io.BytesIO(raw))
        # Many files are encrypted under an empty password, which only forbids copying or printing.
        if reader.is_encrypted and not reader.decrypt(""):
            raise ProblemError(
                "is encrypted; take the password off first: qpdf --decrypt --password=... IN.pdf OUT.pdf"
            )
        pages = [page.extract_text().strip() for page in reader.pages]
    except pypdf.errors.DependencyError:
        raise ProblemError("is encrypted; take the password off first: qpdf --decrypt IN.pdf OUT.pdf") from None
    except PdfReadError as error:
        raise ProblemError(
            f"is a damaged PDF ({' '.join(str(error).split())[:120]}); try: qpdf IN.pdf OUT.pdf"
        ) from None
    if not any(pages):
        raise ProblemError(
            f"is a PDF without any text on its {len(pages)} pages, pictures perhaps; recognise it first: "
            "ocrmypdf IN.pdf OUT.pdf"
        )
    return "\n\n".join(page for page in pages if page)


def _docx(raw: bytes) -> str:
    import mammoth

    # Pictures would come as base64 within the page.
    found = mammoth.convert_to_html(
        io.BytesIO(raw), convert_image=mammoth.images.img_element(lambda image: {"src": ""})
    )
    return _html(found.value.encode())


def _html(raw: bytes) -> str:
    import bs4
    import markdownify

    page = bs4.BeautifulSoup(raw, "html.parser")  # it finds the encoding, as the page or its bytes tell
    for unread in page(["script", "style", "noscript", "template", "svg", "head", "img"]):
        unread.decompose()
    text = markdownify.MarkdownConverter(heading_style="ATX", bullets="-", escape_misc=False).convert_soup(page)
    lines = [line.rstrip() for line in str(text).splitlines()]
    kept = [line for at, line in enumerate(lines) if line or (at and lines[at - 1])]  # one empty line at most
    return "\n".join(kept).strip()


READERS: dict[str, Callable[[bytes], str]] = {"pdf": _pdf, "docx": _docx, "html": _html}


def _limit(size: int, memory: int) -> None:
    """Bound this process for a document of ``size`` bytes to ``memory`` beside it, where the system can."""
    try:
        import resource
    except ImportError:  # Windows; extract's clock is what remains
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    most, hard = memory + PER_BYTE * size, resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> int:
    """``argv``: JSON of the module path of the process that started this one; the reader; the most bytes of text,
    and of memory."""
    sys.path[:] = json.loads(sys.argv[1])
    answers, most = sys.stdout.buffer, int(sys.argv[3])
    sys.stdout = sys.stderr  # nothing but the answer goes to the pipe
    raw = sys.stdin.buffer.read()
    _limit(len(raw), int(sys.argv[4]))
    status = PROBLEM
    try:
        told = READERS[sys.argv[2]](raw)
        status = 0
        if not told.strip():
            status, told = PROBLEM, "has no text in it"
        elif len(told.encode(errors="replace")) > most:
            status, told = PROBLEM, f"has more than {most // 1024:,} KiB of text, which no context set here can hold"
    except ModuleNotFoundError as error:
        status, told = MISSING, str(error.name)
    except ProblemError as error:
        told = str(error)
    except (MemoryError, RecursionError):
        told = "takes more memory to read than any document should"
    # The readers meet files that nobody foresaw, and raise whatever Python raises.
    except Exception as error:
        told = f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    answers.write(told.encode(errors="replace"))
    answers.flush()
    return status


if __name__ == "__main__":
    sys.exit(main())
