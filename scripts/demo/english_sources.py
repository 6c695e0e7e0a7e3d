"""Debian's packages of public English, read and cleaned: what make_english_corpus.py makes its corpus of.

Each reader takes the files of a package (name -> bytes) and yields documents: a dictionary entry, a gloss of WordNet, a
chapter. A document is one line of text, without mark-up, pronunciation, etymology, labels of usage and sources.
"""

import gzip
import io
import re
import struct
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from base.errors import fail

Files = dict[str, bytes]
DIGITS = {digit: value for value, digit in enumerate(
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
)}  # fmt: skip
SHORTEST = 3  # words of a text that is kept: less is a reference or a label


# ---------------------------------------------------------------- packages


def unpack(content: bytes, where: str) -> Files:
    """The files of a .deb, path -> bytes: an ar archive (deb(5)) whose member data.tar.* is a tar archive.

    where: the package, for UserError where it is none.
    """
    if not content.startswith(b"!<arch>\n"):
        fail(f"{where}: is no Debian package; fetch it again")
    place = 8
    while place + 60 <= len(content):
        header = content[place : place + 60]
        name, size = header[:16].decode("latin-1").strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            member = io.BytesIO(content[place + 60 : place + 60 + size])
            with tarfile.open(fileobj=member) as archive:
                names = [entry for entry in archive.getmembers() if entry.isfile()]
                opened = {entry.name.removeprefix("./"): archive.extractfile(entry) for entry in names}
                return {name: file.read() for name, file in opened.items() if file is not None}
        place += 60 + size + size % 2  # members begin at even offsets
    fail(f"{where}: holds no data.tar; fetch it again")


def dictd_entries(index: str, text: bytes) -> Iterator[str]:
    """The entries of a dictionary of dictd (dictfmt(1)), each once, in the order of the text.

    index: lines of headword, offset and length, separated by tabs; both in base 64, the most significant digit first.
    text: what the .dict file holds, uncompressed.
    """

    def number(digits: str) -> int:
        value = 0
        for digit in digits:
            value = 64 * value + DIGITS[digit]
        return value

    spans = set()
    for line in index.splitlines():
        headword, offset, length = line.split("\t")[:3]
        if not re.match("00-?database|00-?dictionary", headword):  # about the dictionary itself
            spans.add((number(offset), number(length)))
    for offset, length in sorted(spans):
        yield text[offset : offset + length].decode("utf-8", "ignore")


# ---------------------------------------------------------------- what the dictionaries share


def paragraphs(entry: str) -> list[str]:
    """The paragraphs of an entry, each in one line."""
    blocks = re.split(r"\n[ \t]*\n", entry)
    return [joined for block in blocks if (joined := " ".join(block.split()))]


def tidy(text: str) -> str:
    """One space between words, none before punctuation or inside brackets, no empty brackets."""
    text = re.sub(r"\(\s*[,;.]?\s*\)", " ", text)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s+([,;.:!?)])", r"\1", text)
    text = re.sub(r"([,;:])(?=[,;:.])", "", text)
    return re.sub(r"\(\s+", "(", text).strip(" ,;-")


def is_prose(text: str) -> bool:
    """Whether `text` is a few words at least, and mostly words: tables and code are not."""
    words = re.findall(r"[A-Za-z][a-z']*", text)
    return len(words) >= SHORTEST and sum(map(len, words)) >= 0.7 * len(text.replace(" ", ""))


def drop_brackets(text: str) -> str:
    """Without [...], also nested ones."""
    before = None
    while text != before:
        before, text = text, re.sub(r"\[[^][]*\]", " ", text)
    return text


# ---------------------------------------------------------------- GCIDE

LIGATURES = {
    "ae": "ae",
    "AE": "Ae",
    "oe": "oe",
    "OE": "Oe",
    "eth": "th",
    "thorn": "th",
    "deg": " degrees",
    "pounds": "£",
    "eacute": "e",
}
PARTS_OF_SPEECH = (
    r"(?:(?:n|v|a|adj|adv|prep|conj|pron|interj|imp|inf|pres|pr|vb|p|pl|sing|obs|t|i|fem|masc|superl|compar|def|indef|"
    r"art|sup|contr|auxiliary|prop)\.|(?:prefix|suffix|&|or|and)(?=[\s,.;]))"
)


def accents(text: str) -> str:
    """GCIDE's [ae], ['e], [=o] ... as plain letters."""
    text = re.sub(rf"\[({'|'.join(LIGATURES)})\]", lambda match: LIGATURES[match[1]], text)
    text = re.sub(r"\[[-=~^`'\",.*:]([A-Za-z]{1,2})\]", r"\1", text)
    return re.sub(r"\[([A-Za-z]{1,2})\^\]", r"\1", text)


def clean_gcide(entry: str) -> str:
    """`headword: definitions and quotations` of an entry of GCIDE; "" where nothing is left."""
    head, *spelled = entry.strip().split("\\", 2)
    if len(spelled) != 2:
        return ""  # no entry begins without its pronunciation
    headword, rest = tidy(accents(head.split("\n")[0])), spelled[1]
    kept = []
    for number, text in enumerate(paragraphs(rest)):
        if re.match(r"Syn:|\[?See |\(?Note: See", text):
            continue
        text = drop_brackets(accents(text))
        text = re.sub(r"\\[^\\]*\\", " ", text).replace("\\", " ")
        if number == 0:  # more pronunciation, parts of speech, plurals, other spellings
            text = re.sub(r"^\s*(\([^)]*\)\s*)*", "", text)
            text = re.sub(rf"^,?\s*(\([^)]*\),?\s*)?({PARTS_OF_SPEECH}[\s,;]*)+", "", text)
            text = re.sub(r"^.{0,60}?\b1\. ", "", text)
            text = re.sub(r"^[A-Z][^.:]{1,50}, ?(n|a|adv|v\. t|v\. i)\.\s", "", text)
        text = re.sub(r"^\s*(Note:|\d+\.?\s|pl\.)\s*", "", text)
        text = re.sub(r"\([a-k]\)\s", " ", text)
        text = re.sub(r"^\s*\((?:[A-Z][A-Za-z]*\.?[ ,&]*)+\)\s*", "", text)  # (Naut.), (Bot. & Zool.)
        text = re.sub(r"\((?:[A-Z][A-Za-z]*\.?[ ,&]+)*[A-Z][A-Za-z]{0,8}\.\)", " ", text)
        text = re.sub(r"(?<=[A-Za-z])[\"`*]+(?=[a-z])", "", text)  # pronunciation of what derives from the word
        text = re.sub(r"\(--[^)]*\)", " ", text)
        text = re.sub(r"\s--\s?[A-Z][\w.,:;'&() -]{0,60}$", "", text)  # the author of a quotation
        text = re.sub(r"\s--(\d\s)?[A-Z][\w']*\.?(\s([ivxlc]+\.|\d+[.,]*|\(?[A-Z][\w'.]*\.\)?|&))*(?=\s|$)", " ", text)
        text = re.sub(r"\s--? ?[A-Z][\w,-]{1,30}, (n|a|adv|v\. t|v\. i)\.", " ", text)
        text = re.sub(r"[{}|_*]", "", text)
        text = tidy(text.replace(" -- ", " - "))
        if is_prose(text):
            kept.append(text)
    return f"{headword}: {' '.join(kept)}" if kept else ""


# ---------------------------------------------------------------- FOLDOC and The Devil's Dictionary


def clean_foldoc(entry: str) -> str:
    """`headword: text` of an entry of FOLDOC; "" where nothing is left."""
    head, _, rest = entry.strip("\n").partition("\n")
    kept: list[str] = []
    for text in paragraphs(rest):
        text = re.sub(r"^<[^>]*>\s*", "", text)  # its subject
        text = re.sub(r"/[^ /]*[*'@-][^/]*/", " ", text) if not kept else text  # pronunciation
        text = drop_brackets(text)
        text = re.sub(r"\{([^{}]*?)\s*\([^{}()]*[./][^{}()]*\)\}", r"\1", text)  # a link and its address
        text = re.sub(r"[{}_]", "", text)
        text = re.sub(r"\(?\b(?:https?|ftp|news|mailto)[:/]\S*|<\S*@\S*>|\S+@\S+\.\w+", " ", text)
        text = tidy(re.sub(r"\(\d{4}(-\d\d){0,2}\)", " ", text))
        if is_prose(text):
            kept.append(text)
    headword = tidy(head.split("%%%")[0])
    return f"{headword}: {' '.join(kept)}" if kept else ""


def clean_devil(entry: str) -> str:
    """`headword: text` of an entry of The Devil's Dictionary, poems included; "" where nothing is left."""
    entry = re.sub(r"(?m)^ {40,}\S.*$", "", entry)  # the poet's name
    head = re.match(r"\s*([A-Z][A-Z' -]+)[,.]?\s*((?:n|v|adj|adv|pp|p|t|i|x)\.\s*)*", entry)
    if head is None:
        return ""
    kept = [tidy(drop_brackets(re.sub(r"[_{}]", "", text))) for text in paragraphs(entry[head.end() :])]
    kept = [text for text in kept if is_prose(text)]
    return f"{head[1].strip().capitalize()}: {' '.join(kept)}" if kept else ""


# ---------------------------------------------------------------- WordNet and the Bible


def wordnet_documents(files: Files) -> Iterator[str]:
    """`words: gloss. Examples.` of each synset (wndb(5WN)), and its examples as sentences."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in files[f"usr/share/wordnet/data.{part}"].decode("utf-8").splitlines():
            if line.startswith("  "):
                continue  # the licence
            fields, _, gloss = line.partition(" | ")
            fields = fields.split(" ")
            count = int(fields[3], 16)
            words = [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
            examples = re.findall(r'"([^"]+)"', gloss)
            meaning = tidy(re.sub(r"[;,]?\s*\"[^\"]*\"?(\s*-\s*[A-Z][\w. ]*)?", " ", gloss))
            sentences = [text[0].upper() + text[1:] for text in map(tidy, examples) if len(text.split()) >= SHORTEST]
            ended = [text if text[-1] in ".!?" else text + "." for text in [meaning, *sentences] if text]
            yield f"{', '.join(words)}: {' '.join(ended)}"


def lzw(coded: bytes) -> bytes:
    """The text of a stream of compress(1), without its three bytes of magic: codes of 9 to 16 bits, least significant
    bit first, 256 = forget the table. Codes of a width come in groups of eight, the last padded (Welch, 1984)."""
    table = [bytes([value]) for value in range(256)] + [b""]
    width, place, begin = 9, 0, 0  # in bits; where the codes of this width begin
    text, previous = [], b""
    while place + width <= 8 * len(coded):
        code = int.from_bytes(coded[place >> 3 : (place >> 3) + 4], "little") >> (place & 7) & ((1 << width) - 1)
        place += width
        if code == 256:
            begin = place = begin + -(-(place - begin) // (8 * width)) * 8 * width
            del table[257:]
            width, previous = 9, b""
            continue
        if code > len(table) or (code == len(table) and not previous):
            raise ValueError(f"code {code} where the table has {len(table)} entries")
        entry = table[code] if code < len(table) else previous + previous[:1]
        text.append(entry)
        if previous and len(table) < 1 << 16:
            table.append(previous + entry[:1])
        previous = entry
        if len(table) == 1 << width and width < 16:
            begin = place = begin + -(-(place - begin) // (8 * width)) * 8 * width
            width += 1
    return b"".join(text)


def bible_text(data: bytes) -> str:
    """The text of bible.data: a title of 84 bytes, the bytes of text in a window, the number of windows, their places
    (big-endian, 4 bytes each), then each window by itself as compress(1) writes it."""
    count = struct.unpack_from(">I", data, 88)[0]
    starts = struct.unpack_from(f">{count}I", data, 92)
    ends = (*starts[1:], len(data))
    return b"".join(lzw(data[start:end]) for start, end in zip(starts, ends, strict=True)).decode("ascii")


def bible_documents(files: Files) -> Iterator[str]:
    """The chapters, without the numbers of the verses."""
    chapter, verses = "", list[str]()
    for line in bible_text(files["usr/lib/bible.data"]).splitlines():
        place = re.match(r"(\d?[A-Z][A-Za-z]*\d+):\d+ ", line)
        if place is None:
            continue  # the title
        if place[1] != chapter and verses:
            yield tidy(" ".join(verses))
            verses = []
        chapter = place[1]
        verses.append(re.sub(r"[\[\]<>{}]", "", line[place.end() :]))
    if verses:
        yield tidy(" ".join(verses))


# ---------------------------------------------------------------- the packages


@dataclass(frozen=True)
class Package:
    """A package of Debian 12: its file, and how its documents are read."""

    name: str
    version: str
    sha256: str
    documents: Callable[[Files], Iterator[str]]

    @property
    def file(self) -> str:
        """The name that apt-get download gives it."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"


def dictionary(name: str, clean: Callable[[str], str]) -> Callable[[Files], Iterator[str]]:
    """A reader of the documents of dictd's dictionary `name`."""

    def documents(files: Files) -> Iterator[str]:
        index = files[f"usr/share/dictd/{name}.index"].decode("utf-8")
        text = gzip.decompress(files[f"usr/share/dictd/{name}.dict.dz"])
        yield from filter(None, map(clean, dictd_entries(index, text)))

    return documents


PACKAGES = (
    Package(
        "dict-gcide",
        "0.48.5+nmu2",
        "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
        dictionary("gcide", clean_gcide),
    ),
    Package(
        "wordnet-base",
        "1:3.0-37",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        wordnet_documents,
    ),
    Package(
        "dict-foldoc",
        "20230119-1",
        "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
        dictionary("foldoc", clean_foldoc),
    ),
    Package(
        "dict-devil",
        "1.0-13.1",
        "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154",
        dictionary("devil", clean_devil),
    ),
    Package(
        "bible-kjv-text", "4.38", "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a", bible_documents
    ),
)
