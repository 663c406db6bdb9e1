"""README.md and docs/ say what the files and the recorded runs say, and GitHub can show them."""

import itertools
import re

import pytest

from base.errors import UserError
from experiments import readme
from metrics.evaluations import records_under
from training.options import parser

ROOT = readme.ROOT
TEXTS = {path: path.read_text() for path in readme.PAGES}
RESULTS = TEXTS[ROOT / "docs" / "RESULTS.md"]
EVERYTHING = "\n".join(TEXTS.values())
FLAG = r"(?<![\w-])--[a-z][a-z_-]*"
each_page = pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)


def prose(text):
    """Without code blocks and inline code."""
    return re.sub(r"`[^`]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def code(text):
    """Every piece of code: lines of blocks, with those that go on joined, and inline pieces.

    The text of a link is none: its target is checked.
    """
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    inline = re.sub(r"^```.*?^```|\[`[^`]*`\]\(", "", text, flags=re.M | re.S)
    return lines + [piece.replace("\n", " ") for piece in re.findall(r"`([^`]+)`", inline)]


def links(text):
    """The targets of links and pictures that stay in the repository."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(text))
            if not target.startswith("http")]


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S),
                          flags=re.M)
    return [readme.slug(heading) for heading in headings]


def tables(text):
    """[[cells of a row], ..] of every table, without the line of dashes."""
    lines = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S).splitlines()
    return [[re.split(r" *(?<!\\)\| *", line)[1:-1] for line in group
             if not re.fullmatch(r"[|\s:-]+", line)]
            for is_table, group in itertools.groupby(lines, lambda line: line.startswith("|"))
            if is_table]


# ---- What is generated ----

@each_page
def test_every_generated_part_agrees_with_the_records_and_files(page):
    assert readme.filled(TEXTS[page]) == TEXTS[page], "run: python -m experiments.readme"


def test_every_part_is_shown_somewhere_and_once():
    shown = re.findall(r"<!-- generated: (\w+) -->", EVERYTHING)
    assert len(shown) == len(set(shown)) == EVERYTHING.count("<!-- end -->")
    assert set(readme.PARTS) - set(shown) <= {"iteration"}


def test_an_unknown_part_is_refused():
    with pytest.raises(UserError, match="'nothing'"):
        readme.filled("<!-- generated: nothing -->\n<!-- end -->")


def test_the_quote_of_iteration_goes_from_its_first_heading_to_its_return():
    source = '''
def other():
    # not this
    return 0


def iteration(roles, drawn,
              student_turn):
    """What it does."""
    before = 1              # not a heading
    # Generate images (Eq. 7)
    for part in drawn:
        # the images
        x0 = roles.student(part)

    # Update the student
    if not student_turn:
        return {}
    return {"x0": x0}


def after():
    # nor this
    return 2
'''
    assert readme.quoted(source) == '''```python
# Generate images (Eq. 7)
for part in drawn:
    # the images
    x0 = roles.student(part)

# Update the student
if not student_turn:
    return {}
return {"x0": x0}
```'''


def test_the_headline_numbers_are_those_of_the_recorded_evaluations():
    records = records_under([ROOT / "results" / "embedded"])
    assert {record["what"] for record in records} >= {"1 step", "2 steps", "3 steps"}
    for record in records:
        mean = record["figures"]["digits-FID"]["mean"]
        assert f"{mean:.3f}" in RESULTS
        how = {"images", "seeds", "rounding", "reference", "features"}
        assert how <= record["protocol"].keys()                 # the protocol is beside it


def test_a_column_that_is_nowhere_measured_becomes_a_sentence():
    rows = [["a", "1", "not measured"], ["b", "not measured", "not measured"]]
    text = readme.speed_tables.measured(["", "time", "on a GPU"], rows)
    assert text == ("|  | time |\n| --- | --- |\n| a | 1 |\n| b | not measured |\n\n"
                    "Not measured: on a GPU.")


def test_the_readme_lists_every_deviation_and_the_code_names_no_other():
    page = TEXTS[ROOT / "docs" / "DEVIATIONS.md"]
    found = re.findall(r"^## (\d+)\. (.+)$", page, flags=re.M)
    numbers, listed = [int(number) for number, _ in found], readme.deviations()
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 13
    assert all(title in listed for _, title in found)
    scripts = [path for room in ("", *readme.ROOMS) for path in (ROOT / room).glob("*.py")]
    named = {int(number) for path in scripts
             for number in re.findall(r"Deviation (\d+)", path.read_text())}
    assert named and named <= set(numbers)


# ---- What is named exists ----

@each_page
def test_every_script_and_command_that_is_named_is_there(page):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for piece in code(TEXTS[page]):
        piece = piece.partition("#")[0]
        for name in re.findall(r"(?<![\w./-])([a-z_0-9/]+\.py)\b", piece):
            assert (ROOT / name).is_file(), name
        for module in re.findall(r"python -m ([\w.]+)", piece):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
        for target in re.findall(r"^make (\w+)", piece):
            assert target in targets, target


@each_page
def test_every_link_picture_and_anchor_is_there(page):
    for target in links(TEXTS[page]):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists() and path.is_relative_to(ROOT), target
        if anchor:
            assert anchors(path.read_text()).count(anchor) == 1, target


def test_every_page_of_docs_can_be_reached_from_the_readme():
    assert {f"docs/{page.name}" for page in readme.PAGES[1:]} <= {
        target.partition("#")[0] for target in links(TEXTS[readme.PAGES[0]])}


def test_every_test_that_is_named_is_there():
    names = re.findall(r"`(test_\w+)`", EVERYTHING)
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(names) >= 14 and all(f"def {name}(" in sources for name in names), names


@each_page
def test_every_flag_that_is_named_exists(page):
    known = {flag for action in parser()._actions for flag in action.option_strings}
    scripts = [ROOT / name for name in ("sample.py", "evaluate.py", "fid.py")]
    others = {flag for path in [*scripts, *ROOT.glob("weights/*.py"), *ROOT.glob("base/*.py"),
                                *ROOT.glob("experiments/*.py")]
              for flag in re.findall(rf'"({FLAG})"', path.read_text())}
    torchrun = {"--nproc_per_node", "--max-restarts", "--shutdown-timeout", "--signals-to-handle"}
    for piece in code(TEXTS[page]):
        command, _, given = piece.partition("#")[0].partition("train.py ")
        flags = re.findall(FLAG, given)
        assert set(flags) <= known, piece
        assert set(re.findall(FLAG, command)) <= known | others | torchrun, piece


# ---- GitHub renders it well ----

def test_the_readme_is_for_the_first_visit():
    assert len(TEXTS[readme.PAGES[0]].splitlines()) <= 200
    assert max(map(len, TEXTS[readme.PAGES[0]].splitlines())) <= 200


WRAPPED, SCREEN = 24, 140       # characters of a column that can be wrapped; of a table


@each_page
def test_tables_fit_a_screen(page):
    for table in tables(TEXTS[page]):
        assert len({len(row) for row in table}) == 1, table[0]
        assert max(len(cell) for row in table for cell in row) <= 200, table[0]
        width = 0
        for column in zip(*table):
            shown = [re.sub(r"`|\[|\]\([^)]*\)", "", cell) for cell in column]
            longest_word = max(len(word) for cell in shown for word in [*cell.split(), ""])
            width += 3 + max(longest_word, min(WRAPPED, max(map(len, shown))))
        assert width <= SCREEN, table[0]
