"""The README says what the files and the recorded runs say."""

import json
import re
from pathlib import Path

import pytest

from experiments import readme
from base.errors import UserError
from metrics.evaluations import records_under

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_every_generated_part_agrees_with_the_records_and_files():
    assert readme.filled(TEXT) == TEXT, "run: python -m experiments.readme"


def test_an_unknown_table_is_refused():
    with pytest.raises(UserError, match="'nothing'"):
        readme.filled("<!-- table: nothing -->\n<!-- end -->")


def test_the_headline_numbers_are_those_of_the_recorded_evaluations():
    records = records_under([ROOT / "results" / "embedded"])
    assert {record["what"] for record in records} >= {"1 step", "2 steps", "3 steps"}
    for record in records:
        mean = record["figures"]["digits-FID"]["mean"]
        assert f"{mean:.3f}" in TEXT
        assert json.dumps(record["protocol"])                   # the protocol is beside it


def test_every_script_and_picture_that_the_readme_names_is_there():
    for name in re.findall(r"`([a-z_0-9/-]+\.py)`", TEXT):
        assert (ROOT / name).is_file(), name
    for picture in re.findall(r"\]\(([^):]+\.png)\)", TEXT):
        assert (ROOT / picture).is_file(), picture


def test_every_train_flag_in_the_readme_exists():
    from training.options import parser
    known = {flag for action in parser()._actions for flag in action.option_strings}
    for line in re.findall(r"train\.py ([^\n`]+)", TEXT):
        for flag in re.findall(r"--[a-z-]+", line.split("#")[0]):
            assert flag in known, flag
