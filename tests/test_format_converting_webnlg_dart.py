"""The WebNLG and DART converters: examples, order, `cate`, and what they refuse."""

import hashlib
import json

import pytest

from helpers.processes import ROOT, assert_user_error, run_script

WEBNLG = ROOT / "src" / "format_converting_webnlg.py"
DART = ROOT / "src" / "format_converting_dart.py"


def convert(script, folder, data, *flags):
    """Run a converter on a JSON value or a text; return (finished process, its examples or None)."""
    source, target = folder / "in.json", folder / "out.jsonl"
    source.write_text(data if isinstance(data, str) else json.dumps(data, ensure_ascii=False), encoding="utf-8")
    done = run_script(script, source, target, *flags)
    return done, target.read_text(encoding="ascii").splitlines() if target.exists() else None


def entry(category, texts, triples):
    return {
        "category": category,
        "lexicalisations": [{"comment": comment, "lex": text} for comment, text in texts],
        "modifiedtripleset": [{"subject": s, "property": p, "object": o} for s, p, o in triples],
    }


def test_webnlg(tmp_path):
    entries = [
        {"1": entry("Food", [("good", "Soup é."), ("toFix", "bad"), ("good", "A soup.")],
                    [("Soup", "isA", "Dish"), ("Soup", "from", '"Aarhus, Denmark"')])},
        {"2": entry("Athlete", [("good", "He runs.")], [("He", "does", "Running")])},
    ]
    done, lines = convert(WEBNLG, tmp_path, {"entries": entries})
    soup = r'{"context": "Soup : isA : Dish | Soup : from : \"Aarhus, Denmark\"", "completion": '
    assert lines == [
        soup + r'"Soup \u00e9.", "cate": true}',
        soup + r'"A soup.", "cate": true}',
        '{"context": "He : does : Running", "completion": "He runs.", "cate": false}',
    ], done.stderr
    assert "; left out 1 texts not judged good; 1 of categories not seen in training" in done.stdout


def test_webnlg_releases_and_languages(tmp_path):
    """A category that a release does not know is refused, for nobody knows whether it was trained on; a text of another
    language is left out, and counted."""
    entries = [{"1": entry(category, [("good", "A text.")], [("a", "b", "c")])}
               for category in ("Artist", "Film", "Food")]
    for text, language in zip(("En.", "Ру."), ("en", "ru")):
        entries[0]["1"]["lexicalisations"].append({"comment": "good", "lang": language, "lex": text})
    done, _ = convert(WEBNLG, tmp_path, {"entries": entries})
    assert_user_error(done, "entry 2", "'Film' is not one of WebNLG 2017", "--seen 2017 or 3.0")
    done, lines = convert(WEBNLG, tmp_path, {"entries": entries}, "--seen", "3.0")
    examples = [json.loads(line) for line in lines]
    assert [example["completion"] for example in examples] == ["A text.", "En.", "A text.", "A text."], done.stderr
    assert [example["cate"] for example in examples] == [True, True, False, True]
    assert "left out 1 texts of language 'ru'; 1 of categories not seen" in done.stdout
    done, lines = convert(WEBNLG, tmp_path, {"entries": entries[:1]}, "--lang", "ru")
    assert [json.loads(line)["completion"] for line in lines] == ["Ру."]
    assert "left out 2 texts of language 'en'" in done.stdout  # "A text." names none


@pytest.mark.parametrize("lex", ['<lex comment="good" lang="">{}</lex>',
                                 '<lex comment="good"><text>{}</text><template>x</template></lex>'])
def test_webnlg_xml_gives_what_its_json_gives(tmp_path, lex):
    entries = [{"1": entry("Food", [("good", "Soup & é."), ("toFix", "bad"), ("good", "")],
                           [("Soup", "isA", "Dish"), ("Soup", "from", '"Aarhus | Denmark"')])}]
    xml = ('<?xml version="1.0" encoding="utf-8"?>\n<benchmark><entries>\n<entry category="Food" eid="1" size="2">'
           "<originaltripleset><otriple>a | b | c</otriple></originaltripleset><modifiedtripleset>"
           "<mtriple>Soup | isA | Dish</mtriple><mtriple>Soup | from | \"Aarhus | Denmark\"</mtriple>"
           "</modifiedtripleset>" + lex.format("Soup &amp; é.") + '<lex comment="toFix">bad</lex>' + lex.format("") +
           "</entry></entries></benchmark>")
    expected, examples = convert(WEBNLG, tmp_path, {"entries": entries})
    done, lines = convert(WEBNLG, tmp_path, f"\ufeff{xml}")
    assert lines == examples and len(lines) == 1 and done.stdout == expected.stdout, done.stderr


def test_webnlg_dev_set(tmp_path, shared):
    """The real file, against a reading of it without our code."""
    source, target = shared / "data" / "webnlg" / "dev.json", tmp_path / "out.jsonl"
    assert run_script(WEBNLG, source, target).returncode == 0
    lines = iter(target.read_text().splitlines())
    count = 0
    for number, wrapped in enumerate(json.loads(source.read_text(encoding="utf-8"))["entries"], start=1):
        record = wrapped[str(number)]
        triples = [f"{t['subject']} : {t['property']} : {t['object']}" for t in record["modifiedtripleset"]]
        for text in record["lexicalisations"]:
            if text["comment"] == "good":
                expected = {"context": " | ".join(triples), "completion": text["lex"], "cate": True}
                assert json.loads(next(lines)) == expected
                count += 1
    assert next(lines, None) is None and count > 2000
    assert hashlib.sha256(target.read_bytes()).hexdigest() in (ROOT / "scripts/create_datasets.sh").read_text()


def test_dart(tmp_path):
    """A hand-written file in the form of DART v1.1.1."""
    data = [
        {
            "tripleset": [["Mars Hill College", "JOINED", "1973"], ["[TABLECONTEXT]", "[TITLE]", "Südliga"]],
            "subtree_was_extended": True,
            "annotations": [
                {"source": "WikiSQL_decl_sents", "text": "A school joined in 1973."},
                {"source": "WikiSQL_decl_sents", "text": " "},
                {"source": "WikiSQL_lily", "text": "Mars Hill joined."},
            ],
        },
        {
            "tripleset": [["The Mill", "eatType", "pub"]],
            "subtree_was_extended": False,
            "annotations": {"source": ["e2e"], "text": ["The Mill is a pub ."]},  # as a data hub serves them
        },
    ]
    done, lines = convert(DART, tmp_path, data)
    mars = r'{"context": "Mars Hill College : joined : 1973 | [TABLECONTEXT] : [title] : S\u00fcdliga", "completion": '
    assert lines == [
        mars + '"A school joined in 1973."}',
        mars + '"Mars Hill joined."}',
        '{"context": "The Mill : eattype : pub", "completion": "The Mill is a pub ."}',
    ], done.stderr
    assert "3 examples of 2 contexts; left out 1 empty texts" in done.stdout
    rows = [json.dumps(row, ensure_ascii=False) for row in data]
    for text, count in (("\n".join(rows), 3), ("\ufeff" + "\r\n".join([*rows, ""]), 3), (rows[0], 2)):  # JSON lines
        assert convert(DART, tmp_path, text)[1] == lines[:count]


GOOD = entry("Food", [("good", "Soup.")], [("Soup", "isA", "Dish")])


@pytest.mark.parametrize("script, data, words", [
    (WEBNLG, '{"entries": [\n{"1": {', ["in.json:2", "not JSON"]),
    (WEBNLG, [], ["entries"]),
    (WEBNLG, {"entries": []}, ["no text to take"]), (WEBNLG, "\ufeff<?xml?>", ["in.json:1: not XML"]),
    (WEBNLG, {"entries": [{"1": GOOD | {"lexicalisations": [{"lex": "x"}]}}]}, ["left out 1 texts not judged good"]),
    (WEBNLG, '{"category": "Food"}\n{"category": "Food"}\n', ["in.json: holds", "the challenge's XML, or its JSON"]),
    (WEBNLG, "<?xml?>\n<benchmark>\n<entries>", ["in.json:", "not XML"]),
    (WEBNLG, "<html><p>Not found</p></html>", ["no text to take"]),
    (DART, '{"tripleset": []}\n{"tripleset": [\n', ["in.json:2: not JSON"]), (DART, "<a/>", ["is XML", "JSON list"]),
    (WEBNLG, {"entries": [{"1": GOOD}, {"2": GOOD | {"category": 3}}]}, ["entry 2", "category"]),
    (WEBNLG, {"entries": [{"1": GOOD | {"modifiedtripleset": []}}]}, ["entry 1", "no triple"]),
    (WEBNLG, {"entries": [{"1": GOOD | {"modifiedtripleset": [{"subject": "a"}]}}]}, ["entry 1", "three"]),
    (WEBNLG, {"entries": [{"1": GOOD | {"lexicalisations": [{"comment": "good"}]}}]}, ["entry 1", "lex"]),
    (DART, {"entries": []}, ["JSON list"]),
    (DART, [{"tripleset": [["a", "b"]], "annotations": []}], ["entry 1", "three strings"]),
    (DART, [{"tripleset": [["a", "b", "c"]]}], ["entry 1", "annotations"]),
    (DART, [{"tripleset": [["a", "b", 3]], "annotations": []}], ["entry 1", "three strings"]),
    (DART, [{"tripleset": [["a", "b", "c"]], "annotations": [{"source": "x"}]}], ["entry 1", "text"]),
])
def test_bad_files(tmp_path, script, data, words):
    done, lines = convert(script, tmp_path, data)
    assert_user_error(done, *words)
    assert lines is None and sorted(path.name for path in tmp_path.iterdir()) == ["in.json"]


def test_not_utf8(tmp_path):
    (tmp_path / "in.json").write_bytes(b'["\xff"]')
    assert_user_error(run_script(DART, tmp_path / "in.json", tmp_path / "out.jsonl"), "in.json", "UTF-8", "0xff")
    assert_user_error(run_script(DART, tmp_path / "none.json", tmp_path / "out.jsonl"), "none.json", "No such file")
    assert_user_error(run_script(DART, tmp_path / "in.json", tmp_path / "in.json"), "in.json", "input itself")
