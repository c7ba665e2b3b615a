"""The files around the package: what CI calls exists, versions agree, the changelog keeps its form."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import fastvit

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def list_make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def read_yaml(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_make_lists_every_target():
    """In .PHONY, since a file may have a target's name, and with a line of help."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", text, re.MULTILINE)[1].replace("\\", " ").split()
    assert set(phony) == list_make_targets()
    assert set(re.findall(r"^([a-z-]+):.*##", text, re.MULTILINE)) == list_make_targets()


def test_workflow_calls_make_targets_alone():
    """Whatever hosted CI does a developer can repeat."""
    jobs = read_yaml(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    called = [step["run"].split() for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {command[0] for command in called} == {"make"}
    assert {"lint", "test", "test-oldest", "docs"} == {command[1] for command in called} <= list_make_targets()
    assert all(job["timeout-minutes"] <= 60 for job in jobs.values())


def test_workflow_tests_the_versions_of_python_that_the_package_names():
    jobs = read_yaml(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    tested = jobs["test"]["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: "
    assert tested == [name.removeprefix(prefix) for name in PROJECT["project"]["classifiers"] if prefix in name]
    assert PROJECT["project"]["requires-python"] == f">={tested[0]}"


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_have_what_a_form_needs(name):
    form = read_yaml(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_citation_names_this_version():
    citation = read_yaml(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["message"] and citation["title"]
    assert all(author.get("name") or author.get("family-names") for author in citation["authors"])
    assert citation["version"] == fastvit.__version__
    assert citation["license"] == PROJECT["project"]["license"]


def test_changelog_keeps_its_form():
    """Keep a Changelog: releases, the newest first, with sections of fixed names."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased, *releases = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert unreleased == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", release) for release in releases)
    sections = re.findall(r"^### (.*)$", text.partition("\n## [")[2].partition("\n## [")[0], re.MULTILINE)
    order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    assert sections == [name for name in order if name in sections]
    entries = re.findall(r"^- .*(?:\n  .*)*", text, re.MULTILINE)
    assert all(entry.count("\n") <= 2 for entry in entries), [entry for entry in entries if entry.count("\n") > 2]


def test_wheel_says_that_the_package_is_typed():
    assert (ROOT / "fastvit" / "py.typed").exists()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["fastvit"]
